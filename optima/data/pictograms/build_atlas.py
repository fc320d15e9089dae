"""Draws atlas.png from the Noto Color Emoji font: `python -m optima.data.pictograms.build_atlas`.

Only needed to change the kinds. Reads Debian's `fonts-noto-color-emoji` and checks every noun against the English
annotations in Debian's `unicode-cldr-core`. The atlas is a row-major grid of 64 x 64 RGBA cells, 8 to a row; each
glyph is cropped to its ink, scaled to 64 pixels on its longer side, and centred.
"""

import argparse
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from optima.data.pictograms.atlas import CELL, COLUMNS
from optima.data.pictograms.kinds import KINDS, Kind

FONT_SIZE = 109  # the only size at which the font holds its bitmaps


def annotated_words(annotations: Path) -> dict[str, set[str]]:
    """Maps an emoji to every word of its CLDR name and keywords."""
    words: dict[str, set[str]] = {}
    for annotation in ElementTree.parse(annotations).iter("annotation"):
        words.setdefault(annotation.get("cp", ""), set()).update((annotation.text or "").replace("|", " ").split())
    return words


def draw_cell(kind: Kind, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One 64 x 64 RGBA cell with the kind's glyph."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), kind.emoji, font=font, embedded_color=True)
    glyph = canvas.crop(canvas.getchannel("A").getbbox())
    scale = CELL / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(glyph, ((CELL - glyph.width) // 2, (CELL - glyph.height) // 2))
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the atlas of pictograms from Noto Color Emoji.")
    parser.add_argument("--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument(
        "--annotations", type=Path, default=Path("/usr/share/unicode/cldr/common/annotations/en.xml"), help="CLDR names"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("atlas.png"))
    arguments = parser.parse_args()
    for path, package in ((arguments.font, "fonts-noto-color-emoji"), (arguments.annotations, "unicode-cldr-core")):
        if not path.is_file():
            parser.error(f"{path} does not exist; install the Debian package {package} or give the file's path")

    words = annotated_words(arguments.annotations)
    unnamed = [kind.name for kind in KINDS if kind.name not in words.get(kind.emoji, set())]
    if unnamed:
        parser.error(f"CLDR does not call the emoji so: {', '.join(unnamed)}")

    font = ImageFont.truetype(arguments.font, FONT_SIZE)
    rows = -(-len(KINDS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for number, kind in enumerate(KINDS):
        atlas.paste(draw_cell(kind, font), (number % COLUMNS * CELL, number // COLUMNS * CELL))
    atlas.save(arguments.out, optimize=True)
    print(f"{arguments.out}: {len(KINDS)} kinds, {arguments.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
