"""Images show what the scene says, where it says so."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import optima.data.pictograms
from optima.data.pictograms import KINDS, Pictograms, render

ATLAS = Path(optima.data.pictograms.__file__).with_name("atlas.png")


def glyph(kind: int) -> Image.Image:
    """The kind's emoji cut from the atlas: row-major cells of 64 pixels, 8 to a row."""
    left, top = kind % 8 * 64, kind // 8 * 64
    cell = Image.open(ATLAS).convert("RGBA").crop((left, top, left + 64, top + 64))
    return cell.crop(cell.getchannel("A").getbbox())


def test_a_image_is_uint8_channels_first(seed: int) -> None:
    image = Pictograms("train", seed).pixels(0)
    assert image.shape == (3, 64, 64)
    assert image.dtype == np.uint8


def test_an_object_changes_the_image_only_inside_its_box_and_by_its_emoji(seed: int) -> None:
    images = Pictograms("train", seed)
    for index in range(150):
        scene = images.scene(index)
        alone = [replace(scene, things=(thing,)) for thing in scene.things]
        empty = render(replace(scene, things=()))
        for thing, one in zip(scene.things, alone, strict=True):
            left, top, right, bottom = thing.box
            image = render(one)
            changed = (image != empty).any(axis=0)
            inside = np.zeros((64, 64), dtype=bool)
            inside[top:bottom, left:right] = True
            assert changed[inside].mean() > 0.15, f"scene {index} of seed {seed}"
            assert not changed[~inside].any()

            rgba = np.asarray(glyph(thing.kind).resize((right - left, bottom - top), Image.Resampling.LANCZOS), float)
            opaque = rgba[..., 3] > 250
            drawn = image[:, top:bottom, left:right].transpose(1, 2, 0)
            assert np.abs(drawn[opaque] - rgba[opaque][:, :3]).max(initial=0) <= 6, f"scene {index} of seed {seed}"


def test_the_cover_is_opaque_grey_and_hatched(seed: int) -> None:
    images = Pictograms("train", seed)
    scene = next(scene for scene in map(images.scene, range(1000)) if scene.cover)
    left, top, right, bottom = scene.cover
    on_red, on_blue = (
        render(replace(scene, background=replace(scene.background, colours=(colour, colour))))[
            :, top:bottom, left:right
        ]
        for colour in ((200, 90, 90), (90, 90, 200))
    )
    assert (on_red == on_blue).all()
    assert (on_red == on_red[:1]).all()
    assert np.unique(on_red[0, 1:-1, 1:-1]).tolist() == [96, 150]


def test_every_kind_looks_unlike_every_other_at_the_smallest_size() -> None:
    small = []
    for kind in range(len(KINDS)):
        canvas = Image.new("RGBA", (14, 14), (170, 170, 170, 255))
        emoji = glyph(kind)
        emoji.thumbnail((14, 14), Image.Resampling.LANCZOS)
        canvas.alpha_composite(emoji, ((14 - emoji.width) // 2, (14 - emoji.height) // 2))
        small.append(np.asarray(canvas.convert("RGB"), float).ravel())
    distance = np.sqrt(((np.array(small)[:, None] - np.array(small)[None]) ** 2).mean(axis=2))
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 25


def test_drawing_keeps_up_with_training() -> None:
    """The default run takes ten steps of 32 images a second on two cores: 3 ms an image.

    The best of three, in time of the processor: a neighbour on the same core may double it.
    """
    images = Pictograms("train", 1)
    images.training_batch(0, 200)
    times = []
    for first in (200, 400, 600):
        start = time.process_time()
        images.training_batch(first, 200)
        times.append((time.process_time() - start) / 200)
    each = min(times)
    print(f"{each * 1e6:.0f} microseconds of one core per image with its texts, {1 / each:.0f} images/s")
    assert each < 2e-3
