"""Bar charts to read and scenes of shapes to count, with answers after a short thought."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

from PIL import Image, ImageDraw

from train.synthetic import drawing

LABELS = (("Mon", "Tue", "Wed", "Thu", "Fri"), ("A", "B", "C", "D", "E"), ("Ann", "Bob", "Eva", "Jim", "Zoe"))
TITLES = ("Sales", "Rain", "Visits", "Points")
SCALE_MAX = 10
MARGIN_LEFT, MARGIN_TOP, MARGIN_BOTTOM = 18, 18, 15  # pixels around the bars
MAX_COUNT = 4  # shapes in a group
NUMBERS = ("no", "one", "two", "three", "four")


@dataclass(frozen=True)
class Bar:
    colour: str
    label: str
    value: int


@dataclass(frozen=True)
class Chart:
    """Bars of different colours and different whole values from 1 to `TOP`, left to right."""

    style: drawing.Style
    title: str
    bars: tuple[Bar, ...]

    def questions(self, rng: Random) -> list[tuple[str, str]]:
        """One or two turns of different kinds: (question, answer)."""
        reading = describe_bars(self.bars)
        tallest = max(self.bars, key=lambda bar: bar.value).colour
        shortest = min(self.bars, key=lambda bar: bar.value).colour
        one, other = rng.choice(self.bars), rng.choice(self.bars)
        this, that = rng.sample(self.bars, 2)
        larger = max(this, that, key=lambda bar: bar.value).colour
        mark = rng.randint(3, 7)
        above = [bar.colour for bar in self.bars if bar.value > mark]
        high = drawing.join_words(above) if above else "none"
        ask_value = rng.choice(("What is the value of the {} bar?", "How high is the {} bar?"))
        turns = [
            (
                rng.choice(("Which bar is the tallest?", "Which bar is the highest?")),
                f"<think>{reading} The tallest is {tallest}.</think>{tallest}",
            ),
            (
                rng.choice(("Which bar is the shortest?", "Which bar is the lowest?")),
                f"<think>{reading} The shortest is {shortest}.</think>{shortest}",
            ),
            (
                ask_value.format(one.colour),
                f"<think>The {one.colour} bar reaches {one.value}.</think>{one.value}",
            ),
            (
                rng.choice(("What is the value of {}?", "What does {} have?")).format(other.label),
                f"<think>{other.label} is {other.colour}. It reaches {other.value}.</think>{other.value}",
            ),
            (
                f"Which is larger, {this.colour} or {that.colour}?",
                f"<think>{describe_bars([this, that])} The larger is {larger}.</think>{larger}",
            ),
            (
                f"How many bars are above {mark}?",
                f"<think>{reading} Above {mark}: {high}.</think>{len(above)}",
            ),
        ]
        return rng.sample(turns, rng.randint(1, 2))

    def caption(self, detailed: bool) -> str:
        if detailed:
            parts = [f"{bar.label} {bar.value} in {bar.colour}" for bar in self.bars]
            return f"A bar chart of {self.title}: {drawing.join_words(parts)}."
        return (
            f"A bar chart with {drawing.join_words([drawing.with_article(f'{bar.colour} bar') for bar in self.bars])}."
        )

    def draw(self) -> Image.Image:
        image = self.style.canvas()
        pen = ImageDraw.Draw(image)
        width, height = self.style.size
        base = height - MARGIN_BOTTOM
        unit = (base - MARGIN_TOP) / SCALE_MAX
        drawing.draw_text(pen, (width / 2, 7), self.title, 11, self.style.ink, "mm")
        for value in range(0, SCALE_MAX + 1, 2):
            y = round(base - value * unit)
            pen.line((MARGIN_LEFT, y, width - drawing.GAP, y), fill=self.style.line)
            drawing.draw_text(pen, (MARGIN_LEFT - 3, y), str(value), 10, self.style.ink, "rm")
        step = (width - MARGIN_LEFT - drawing.GAP) / len(self.bars)
        for i, bar in enumerate(self.bars):
            middle = MARGIN_LEFT + (i + 0.5) * step
            left, right = round(middle - 0.34 * step), round(middle + 0.34 * step)
            pen.rectangle((left, round(base - bar.value * unit), right, base), fill=drawing.COLOURS[bar.colour])
            drawing.draw_text(pen, (middle, base + 7), bar.label, 10, self.style.ink, "mm")
        return image


def describe_bars(bars: Sequence[Bar]) -> str:
    return f"The bars reach {drawing.join_words([f'{bar.colour} {bar.value}' for bar in bars])}."


@dataclass(frozen=True)
class Shape:
    glyph: str
    side: int
    colour: str
    box: drawing.Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.glyph}"


@dataclass(frozen=True)
class Scene:
    """Shapes in groups of one colour and glyph, at most `MOST` to a group."""

    style: drawing.Style
    shapes: tuple[Shape, ...]

    def groups(self) -> dict[str, list[Shape]]:
        """Shapes by colour and glyph ("red star"), in reading order of their first."""
        found: dict[str, list[Shape]] = {}
        for i in drawing.reading_order([shape.box for shape in self.shapes], self.style.size):
            found.setdefault(self.shapes[i].name, []).append(self.shapes[i])
        return found

    def count_question(self, noun: str) -> tuple[str, str] | None:
        """Asks how many there are of "red star", "red shape" or "star"; None where there are too many."""
        named = [
            (name, shape)
            for name, shapes in self.groups().items()
            for shape in shapes
            if noun in (name, shape.glyph, f"{shape.colour} shape")
        ]
        if len(named) > MAX_COUNT:
            return None
        order = drawing.reading_order([shape.box for _, shape in named], self.style.size)
        size = self.style.size
        regions = [drawing.region(*drawing.centre(named[i][1].box, size)) for i in order]
        thought = f"I see: {drawing.join_words(regions)}. That makes {len(regions)}." if regions else "I see none."
        return f"How many {plural(noun)} are there?", f"<think>{thought}</think>{len(regions)}"

    def questions(self, rng: Random) -> list[tuple[str, str]]:
        """One to three turns: (question, answer)."""
        groups = self.groups()
        colours = {shape.colour for shape in self.shapes}
        glyphs = {shape.glyph for shape in self.shapes}
        absent = sorted({f"{colour} {glyph}" for colour in colours for glyph in glyphs} - set(groups))
        nouns = [*groups, *(f"{colour} shape" for colour in sorted(colours)), *sorted(glyphs)]
        if absent:
            nouns.append(rng.choice(absent))
        counts = [turn for noun in nouns if (turn := self.count_question(noun))]
        compares = list(self.comparisons(rng))
        turns = rng.sample(counts, min(len(counts), rng.randint(1, 2)))
        if compares:
            turns.insert(rng.randint(0, len(turns)), rng.choice(compares))
        return turns

    def comparisons(self, rng: Random) -> Iterator[tuple[str, str]]:
        """Which of two groups has more, or which of two single shapes is larger."""
        for pair in combinations(self.groups().items(), 2):
            (this, these), (that, those) = rng.sample(pair, 2)
            if len(these) != len(those):
                yield (
                    f"Are there more {plural(this)} or {plural(that)}?",
                    f"<think>I count {count_phrase(len(these), this)} and {count_phrase(len(those), that)}.</think>"
                    f"{plural(this if len(these) > len(those) else that)}",
                )
            elif len(these) == 1 and these[0].side != those[0].side:
                larger = this if these[0].side > those[0].side else that
                words = ["big" if shape.side == max(SIDES) else "small" for shape in (these[0], those[0])]
                yield (
                    f"Which is larger, the {this} or the {that}?",
                    f"<think>The {this} is {words[0]}, the {that} is {words[1]}.</think>the {larger}",
                )

    def caption(self, detailed: bool) -> str:
        if not detailed:
            parts = [count_phrase(len(shapes), name) for name, shapes in self.groups().items()]
            return f"A scene with {drawing.join_words(parts)}."
        size = self.style.size
        where = []
        for i in drawing.reading_order([shape.box for shape in self.shapes], size):
            shape = self.shapes[i]
            phrase = drawing.region_phrase(drawing.region(*drawing.centre(shape.box, size)))
            where.append(f"{drawing.with_article(shape.name)} {phrase}")
        return f"A {'dark' if self.style.dark else 'light'} scene with {drawing.join_words(where)}."

    def draw(self) -> Image.Image:
        image = self.style.canvas()
        for shape in self.shapes:
            drawing.paste_glyph(image, shape.glyph, shape.side, shape.colour, shape.box[:2])
        return image


SIDES = (18, 30)  # pixels of a small and of a big shape, far enough apart to tell


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def count_phrase(number: int, noun: str) -> str:
    return drawing.with_article(noun) if number == 1 else f"{NUMBERS[number]} {plural(noun)}"


def random_chart(rng: Random, heldout: bool) -> Chart:
    number = rng.randint(3, 5)
    colours = rng.sample(list(drawing.COLOURS), number)
    labels = rng.choice(LABELS)[:number]
    values = rng.sample(range(1, SCALE_MAX + 1), number)
    bars = tuple(Bar(*bar) for bar in zip(colours, labels, values, strict=True))
    return Chart(drawing.random_style(rng, heldout), rng.choice(TITLES), bars)


def random_scene(rng: Random, heldout: bool) -> Scene:
    """Two or three groups from a few colours and glyphs, so that both must be seen."""
    style = drawing.random_style(rng, heldout)
    colours, glyphs = rng.sample(list(drawing.COLOURS), 2), rng.sample(drawing.GLYPHS, 2)
    kinds = rng.sample([(colour, glyph) for colour in colours for glyph in glyphs], rng.randint(2, 3))
    shapes: list[Shape] = []
    for colour, glyph in kinds:
        for _ in range(rng.choices(range(1, MAX_COUNT + 1), (3, 2, 2, 2))[0]):
            side = rng.choice(SIDES)
            taken = [shape.box for shape in shapes]
            if box := drawing.free_box(rng, style.size, drawing.glyph(glyph, side).size, taken):
                shapes.append(Shape(glyph, side, colour, box))
    return Scene(style, tuple(shapes))
