"""Where things stand: inside, apart, in their halves, and never behind the cover."""

from itertools import combinations

from pictograms_oracle import stands

from optima.data.pictograms import KINDS, Pictograms

SCENES = 3000


def test_objects_are_inside_have_the_promised_size_and_hardly_overlap(seed: int) -> None:
    images = Pictograms("train", seed)
    for index in range(SCENES):
        scene = images.scene(index)
        assert 1 <= len(scene.things) <= 4
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert left >= 0
            assert top >= 0
            assert right <= 64
            assert bottom <= 64
            assert 14 <= max(right - left, bottom - top) <= 28
        for one, other in combinations(scene.things, 2):
            wide = min(one.box.right, other.box.right) - max(one.box.left, other.box.left)
            high = min(one.box.bottom, other.box.bottom) - max(one.box.top, other.box.top)
            assert min(wide, high) <= 1, f"scene {index} of seed {seed}"


def test_a_cover_hides_a_spot_where_no_object_stands(seed: int) -> None:
    images = Pictograms("train", seed)
    covers = 0
    for index in range(SCENES):
        scene = images.scene(index)
        assert (scene.cover is not None) == scene.content.covered
        if scene.cover is None:
            continue
        covers += 1
        left, top, right, bottom = scene.cover
        assert sorted((right - left, bottom - top)) >= [16, 24]
        assert min(left, top) >= 0
        assert max(right, bottom) <= 64
        for thing in scene.things:
            box = thing.box
            assert box.right <= left or box.left >= right or box.bottom <= top or box.top >= bottom
    assert 0.3 < covers / SCENES < 0.4


def test_the_content_is_what_stands_in_the_image_and_one_relation_alone_holds(seed: int) -> None:
    images = Pictograms("test", seed, size=SCENES)
    singles = 0
    for index in range(SCENES):
        scene = images.scene(index)
        kinds = [thing.kind for thing in scene.things]
        assert [(group.kind, group.count) for group in scene.content.groups] == [
            (kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)
        ]
        if scene.content.axis is None:
            singles += 1
            continue
        first, second = (KINDS[group.kind].name for group in scene.content.groups)
        expected = {"horizontal": "to the left of", "vertical": "above"}[scene.content.axis]
        assert stands(scene, first, second) == {expected}, f"scene {index} of seed {seed}"
    assert 0.35 < singles / SCENES < 0.45
