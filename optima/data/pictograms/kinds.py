"""The 48 kinds of object an image can show.

Each kind is one emoji. Its noun is the emoji's CLDR name or one of its CLDR keywords (`build_atlas` checks this),
chosen so that every noun is a single word; the kinds were picked by eye to stay apart at 14 pixels.
"""

from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of object: its noun, the noun's plural, and the emoji that draws it."""

    name: str
    plural: str
    emoji: str

    @property
    def one(self) -> str:
        """The noun with its indefinite article: "a dog", "an owl"."""
        return f"{'an' if self.name[0] in 'aeio' or self.name == 'umbrella' else 'a'} {self.name}"


KINDS: tuple[Kind, ...] = (
    Kind("dog", "dogs", "\U0001f415"),
    Kind("cat", "cats", "\U0001f408"),
    Kind("cow", "cows", "\U0001f404"),
    Kind("pig", "pigs", "\U0001f416"),
    Kind("elephant", "elephants", "\U0001f418"),
    Kind("turtle", "turtles", "\U0001f422"),
    Kind("fish", "fish", "\U0001f41f"),
    Kind("octopus", "octopuses", "\U0001f419"),
    Kind("butterfly", "butterflies", "\U0001f98b"),
    Kind("owl", "owls", "\U0001f989"),
    Kind("penguin", "penguins", "\U0001f427"),
    Kind("parrot", "parrots", "\U0001f99c"),
    Kind("frog", "frogs", "\U0001f438"),
    Kind("panda", "pandas", "\U0001f43c"),
    Kind("lion", "lions", "\U0001f981"),
    Kind("fox", "foxes", "\U0001f98a"),
    Kind("zebra", "zebras", "\U0001f993"),
    Kind("snail", "snails", "\U0001f40c"),
    Kind("cactus", "cactuses", "\U0001f335"),
    Kind("tree", "trees", "\U0001f332"),
    Kind("rose", "roses", "\U0001f339"),
    Kind("sunflower", "sunflowers", "\U0001f33b"),
    Kind("mushroom", "mushrooms", "\U0001f344"),
    Kind("apple", "apples", "\U0001f34e"),
    Kind("banana", "bananas", "\U0001f34c"),
    Kind("watermelon", "watermelons", "\U0001f349"),
    Kind("pineapple", "pineapples", "\U0001f34d"),
    Kind("carrot", "carrots", "\U0001f955"),
    Kind("pizza", "pizzas", "\U0001f355"),
    Kind("hamburger", "hamburgers", "\U0001f354"),
    Kind("doughnut", "doughnuts", "\U0001f369"),
    Kind("car", "cars", "\U0001f697"),
    Kind("bus", "buses", "\U0001f68c"),
    Kind("tractor", "tractors", "\U0001f69c"),
    Kind("rocket", "rockets", "\U0001f680"),
    Kind("sailboat", "sailboats", "⛵"),
    Kind("guitar", "guitars", "\U0001f3b8"),
    Kind("bell", "bells", "\U0001f514"),
    Kind("key", "keys", "\U0001f511"),
    Kind("drum", "drums", "\U0001f941"),
    Kind("balloon", "balloons", "\U0001f388"),
    Kind("crown", "crowns", "\U0001f451"),
    Kind("umbrella", "umbrellas", "☂"),
    Kind("clock", "clocks", "⏰"),
    Kind("camera", "cameras", "\U0001f4f7"),
    Kind("house", "houses", "\U0001f3e0"),
    Kind("star", "stars", "⭐"),
    Kind("heart", "hearts", "❤"),
)
"""Index in this tuple = the kind's number everywhere in the data set."""
