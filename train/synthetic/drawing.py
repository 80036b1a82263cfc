"""Drawing: sizes, colours, fonts, glyphs, names of regions, and where boxes fit.

Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin
from random import Random
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]
RGB = tuple[int, int, int]

# Width and height in pixels, whole 16-pixel patches: 56 to 64 of them an image.
SIZES = ((128, 112), (112, 128), (128, 128))
GRID = 16  # corners lie on a 16-pixel layout grid, as those of interfaces do, and so on the corners of patches
GAP = 4  # pixels kept free between neighbours

COLOURS: dict[str, RGB] = {
    "red": (214, 32, 36),
    "orange": (244, 132, 12),
    "yellow": (238, 206, 24),
    "green": (36, 152, 64),
    "blue": (36, 92, 226),
    "purple": (128, 44, 180),
    "pink": (246, 134, 194),
}
GLYPHS = ("circle", "star", "triangle", "cross", "heart", "bell", "square")
COLUMNS, ROWS = ("left", "", "right"), ("top", "", "bottom")
ORDINALS = ("first", "second", "third")


class Drawable(Protocol):
    """A laid-out image; drawing it uses no randomness."""

    def draw(self) -> Image.Image: ...


@dataclass(frozen=True)
class Style:
    """The neutral colours of an image: everything that is not a named colour."""

    size: tuple[int, int]
    dark: bool
    shade: int

    @property
    def background(self) -> RGB:
        return (self.shade,) * 3

    @property
    def paper(self) -> RGB:
        return (12, 12, 12) if self.dark else (255, 255, 255)

    @property
    def ink(self) -> RGB:
        return (240, 240, 240) if self.dark else (20, 20, 20)

    @property
    def line(self) -> RGB:
        return (104, 104, 104) if self.dark else (176, 176, 176)

    def canvas(self) -> Image.Image:
        return Image.new("RGB", self.size, self.background)


def random_style(rng: Random, heldout: bool) -> Style:
    """Held-out images have an odd background shade and the others an even one: no two can be equal."""
    dark = rng.random() < 0.5
    shade = 2 * (rng.randint(18, 30) if dark else rng.randint(109, 122)) + heldout
    return Style(rng.choice(SIZES), dark, shade)


def blend(a: RGB, b: RGB, share: float) -> RGB:
    """``a`` with ``share`` of ``b`` in it."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=1024)
def text_width(text: str, size: int) -> int:
    return round(font(size).getlength(text))


def draw_text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, fill: RGB, anchor: str) -> None:
    """`anchor` is Pillow's: "lm" is left and middle, "mm" the middle of the text."""
    draw.text(at, text, fill=fill, font=font(size), anchor=anchor)


def contrasting(colour: RGB) -> RGB:
    """Black or white, whichever reads better on `colour` (ITU-R BT.601 luma)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@lru_cache(maxsize=1024)
def glyph(name: str, side: int) -> Image.Image:
    """The mask of a glyph that fills `side` pixels, cut to its outline; drawn large, then reduced."""
    n = 8 * side
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    if name == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif name == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif name == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, 0.9 * n), (0, 0.9 * n)], fill=255)
    elif name == "cross":
        arm = 0.17 * n
        draw.rectangle((n / 2 - arm, 0, n / 2 + arm, n - 1), fill=255)
        draw.rectangle((0, n / 2 - arm, n - 1, n / 2 + arm), fill=255)
    elif name == "star":
        radii = (0.525 * n, 0.22 * n)
        corners = [(radii[i % 2], pi * i / 5) for i in range(10)]
        draw.polygon([(n / 2 + r * sin(a), 0.525 * n - r * cos(a)) for r, a in corners], fill=255)
    elif name == "heart":
        draw.ellipse((0, 0, 0.54 * n, 0.54 * n), fill=255)
        draw.ellipse((0.46 * n, 0, n - 1, 0.54 * n), fill=255)
        draw.polygon([(0.06 * n, 0.42 * n), (0.94 * n, 0.42 * n), (n / 2, 0.95 * n)], fill=255)
    elif name == "bell":
        draw.pieslice((0.16 * n, 0, 0.84 * n, 0.9 * n), 180, 360, fill=255)
        draw.polygon([(0.16 * n, 0.44 * n), (0.84 * n, 0.44 * n), (n - 1, 0.78 * n), (0, 0.78 * n)], fill=255)
        draw.ellipse((0.36 * n, 0.7 * n, 0.64 * n, n - 1), fill=255)
    else:
        raise ValueError(f"no glyph {name!r}: one of {', '.join(GLYPHS)}")
    small = mask.reduce(8)
    return small.crop(small.point(lambda value: 255 * (value > 127)).getbbox())


def paste_glyph(image: Image.Image, name: str, side: int, colour: str, at: tuple[int, int]) -> None:
    image.paste(COLOURS[colour], at, glyph(name, side))


def centre(box: Box, size: tuple[int, int]) -> tuple[float, float]:
    """The centre of a box, in [0, 1] of the image."""
    return (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]


def region(x: float, y: float) -> str:
    """The third of width and height that a point in [0, 1] lies in: "top left", "right", "centre"."""
    column, row = COLUMNS[min(int(3 * x), 2)], ROWS[min(int(3 * y), 2)]
    return f"{row} {column}".strip() or "centre"


def region_phrase(name: str) -> str:
    """A place as a phrase: "at the top left", "on the right", "in the centre"."""
    return f"{ {'left': 'on', 'right': 'on', 'centre': 'in'}.get(name, 'at') } the {name}"


def box_text(box: Box, size: tuple[int, int]) -> str:
    """The answer to a question of where: "[0.12, 0.34, 0.40, 0.52]", fractions of width and height."""
    sides = (size[0], size[1]) * 2
    return "[" + ", ".join(f"{min(max(v / s, 0.0), 1.0):.2f}" for v, s in zip(box, sides, strict=True)) + "]"


def free_box(
    rng: Random, size: tuple[int, int], shape: tuple[int, int], taken: Sequence[Box], top: int = 0
) -> Box | None:
    """A random box of `shape` (width, height) on the grid, below `top`, clear of `taken`; None if none is found."""
    width, height = shape
    columns, rows = range(0, size[0] - width + 1, GRID), range(round_up(top, GRID), size[1] - height + 1, GRID)
    if not columns or not rows:
        return None
    for _ in range(40):
        x, y = rng.choice(columns), rng.choice(rows)
        box = (x, y, x + width, y + height)
        if all(is_disjoint(box, other) for other in taken):
            return box
    return None


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def is_disjoint(a: Box, b: Box) -> bool:
    return a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def join_words(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def reading_order(boxes: Sequence[Box], size: tuple[int, int]) -> Iterator[int]:
    """Indices of boxes row by row (thirds of the height), left to right."""
    centres = [centre(box, size) for box in boxes]
    return iter(sorted(range(len(boxes)), key=lambda i: (int(3 * centres[i][1]), centres[i][0])))
