"""Interface screens: buttons, fields, windows and icons, and questions of where one of them is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageDraw

from train.synthetic import drawing

KINDS = ("button", "field", "window", "icon")
KIND_WEIGHTS = (36, 26, 10, 28)
ICONS = ("circle", "star", "triangle", "cross", "heart", "bell")
LABELS = (
    *("Save", "Open", "Send", "Close", "Help", "Name", "Mail", "Edit", "Copy", "Print"),
    *("Next", "Back", "Login", "City", "Home", "Menu"),
)
TITLES = ("Inbox", "Notes", "Files", "Music", "Store", "Maps")
TITLE_BAR = drawing.GRID  # pixels
HEADER = 13  # pixels of a window's own title
REGION_MARGIN = 0.04  # of the image: a centre this close to another third counts as in both

QUESTIONS = ("Where is {}?", "Where is {}?", "Find {}.", "Locate {}.", "Click {}.", "Give me the box of {}.")
NAMING_SHARE = 0.1  # share of the elements that are shown and to be named, not named and to be found
NAMING_QUESTIONS = ("What is at {}?", "What is in {}?")


@dataclass(frozen=True)
class Element:
    """An icon has the `shape` of a glyph and no label, the other kinds a label and no shape."""

    kind: str
    colour: str
    box: drawing.Box
    label: str
    size: int  # of the label's font or of the glyph
    shape: str

    @property
    def nouns(self) -> tuple[str, ...]:
        return (f"{self.shape} icon", "icon") if self.shape else (self.kind,)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.nouns[0]}"

    def regions(self, size: tuple[int, int]) -> set[str]:
        """Every region that this element may be said to be in."""
        x, y = drawing.centre(self.box, size)
        offsets = (-REGION_MARGIN, 0, REGION_MARGIN)
        return {drawing.region(x + dx, y + dy) for dx in offsets for dy in offsets}


@dataclass(frozen=True)
class Description:
    """A way to name an element; an empty part says nothing."""

    noun: str = ""
    colour: str = ""
    region: str = ""
    label: str = ""

    def matches(self, element: Element, size: tuple[int, int]) -> bool:
        return (
            (not self.noun or self.noun in element.nouns)
            and (not self.colour or self.colour == element.colour)
            and (not self.label or self.label == element.label)
            and (not self.region or self.region in element.regions(size))
        )

    def __str__(self) -> str:
        if self.label:
            return f"'{self.label}'"
        where = drawing.region_phrase(self.region) if self.region else ""
        return " ".join(part for part in ("the", self.colour, self.noun, where) if part)


@dataclass(frozen=True)
class Screen:
    style: drawing.Style
    title: str
    elements: tuple[Element, ...]

    def matching(self, description: Description) -> list[Element]:
        return [element for element in self.elements if description.matches(element, self.style.size)]

    def describe(self, rng: Random, element: Element) -> Description:
        """A random way to name `element` that fits no other; that of colour and kind always exists."""
        regions = element.regions(self.style.size)
        candidates = [(20.0, Description(label=element.label))] if element.label else []
        for noun in element.nouns:
            share = 1 / len(element.nouns)
            candidates += [(65 * share, Description(noun, element.colour)), (10 * share, Description(noun))]
            if len(regions) == 1:
                candidates.append((5 * share, Description(noun, region=min(regions))))
        unambiguous = [(weight, candidate) for weight, candidate in candidates if self.matching(candidate) == [element]]
        return rng.choices([candidate for _, candidate in unambiguous], [weight for weight, _ in unambiguous])[0]

    def questions(self, rng: Random) -> list[tuple[str, str]]:
        """One turn for each element, in random order: (question, answer). Where it is, or what is there."""
        elements = rng.sample(self.elements, len(self.elements))
        return [
            (self.naming_question(rng, element), f"<nothink>{element.name}")
            if rng.random() < NAMING_SHARE
            else (location_question(rng, self.describe(rng, element)), self.answer(element))
            for element in elements
        ]

    def naming_question(self, rng: Random, element: Element) -> str:
        return rng.choice(NAMING_QUESTIONS).format(drawing.box_text(element.box, self.style.size))

    def answer(self, element: Element) -> str:
        return "<nothink>" + drawing.box_text(element.box, self.style.size)

    def in_reading_order(self) -> Iterator[Element]:
        boxes = [element.box for element in self.elements]
        return (self.elements[i] for i in drawing.reading_order(boxes, self.style.size))

    def where(self, element: Element) -> str:
        return drawing.region_phrase(drawing.region(*drawing.centre(element.box, self.style.size)))

    def caption(self, detailed: bool) -> str:
        parts = []
        for element in self.in_reading_order():
            label = f" '{element.label}'" if element.label else ""
            part = drawing.with_article(element.name)
            parts.append(f"{part}{label} {self.where(element)}" if detailed else part)
        look = ("dark " if self.style.dark else "light ") if detailed else ""
        return f"A {look}screen with {drawing.join_words(parts)}."

    def draw(self) -> Image.Image:
        image = self.style.canvas()
        pen = ImageDraw.Draw(image)
        pen.rectangle((0, 0, self.style.size[0] - 1, TITLE_BAR - 1), fill=self.style.line)
        drawing.draw_text(pen, (4, TITLE_BAR / 2), self.title, 10, self.style.ink, "lm")
        for element in self.elements:
            draw_element(image, pen, element, self.style)
        return image


def location_question(rng: Random, description: Description, where: str = "") -> str:
    """`where` names the picture if there are several: " in the second picture"."""
    return rng.choice(QUESTIONS).format(f"{description}{where}")


def draw_element(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, style: drawing.Style) -> None:
    colour, label, size = drawing.COLOURS[element.colour], element.label, element.size
    x1, y1, x2, y2 = element.box
    whole = (x1, y1, x2 - 1, y2 - 1)  # Pillow's rectangles include their last pixel
    middle = (y1 + y2) / 2
    if element.kind == "button":
        pen.rounded_rectangle(whole, 4, fill=colour)
        drawing.draw_text(pen, ((x1 + x2) / 2, middle), label, size, drawing.contrasting(colour), "mm")
    elif element.kind == "field":
        pen.rectangle(whole, fill=drawing.blend(style.paper, colour, 0.3), outline=colour, width=2)
        drawing.draw_text(pen, (x1 + 5, middle), label, size, style.ink, "lm")
        caret = x1 + 7 + drawing.text_width(label, size)
        pen.line((caret, y1 + 5, caret, y2 - 6), fill=colour)
    elif element.kind == "window":
        pen.rectangle(whole, fill=style.paper, outline=colour)
        pen.rectangle((x1, y1, x2 - 1, y1 + HEADER - 1), fill=colour)
        drawing.draw_text(pen, (x1 + 4, y1 + HEADER / 2), label, size, drawing.contrasting(colour), "lm")
        for row, y in enumerate(range(y1 + HEADER + 4, y2 - 4, 5)):
            pen.line((x1 + 5, y, x2 - 6 - 7 * (row % 2), y), fill=style.line)
    else:
        drawing.paste_glyph(image, element.shape, size, element.colour, (x1, y1))


def random_element(rng: Random, area: tuple[int, int], others: list[Element]) -> Element | None:
    """An element that keeps clear of the others, with a label of its own; None if no place was found."""
    kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
    colour = rng.choice(list(drawing.COLOURS))
    label, glyph = "", ""
    if kind == "icon":
        glyph, size = rng.choice(ICONS), 24
        shape = drawing.glyph(glyph, size).size
    else:
        label = rng.choice([label for label in LABELS if all(label != other.label for other in others)])
        size = 10 if kind == "window" else 11
        width = drawing.text_width(label, size)
        if kind == "window":
            shape = (max(width + 10, 44), 30)
        else:
            shape = (drawing.round_up(width + (6 if kind == "button" else 12), 8), drawing.GRID)
    box = drawing.free_box(rng, area, shape, [other.box for other in others], TITLE_BAR)
    return Element(kind, colour, box, label, size, glyph) if box else None


def random_screen(rng: Random, heldout: bool, min_elements: int = 1, max_elements: int = 5) -> Screen:
    """A screen of ``min_elements`` to ``max_elements`` elements, no two of one colour and kind."""
    style, title = drawing.random_style(rng, heldout), rng.choice(TITLES)
    while True:
        elements: list[Element] = []
        for _ in range(rng.randint(min_elements, max_elements)):
            if element := random_element(rng, style.size, elements):
                elements.append(element)
        screen = Screen(style, title, tuple(elements))
        if len(elements) >= min_elements and all(is_unique(screen, element) for element in elements):
            return screen


def is_unique(screen: Screen, element: Element) -> bool:
    """Whether colour and noun alone name one element: the plainest question can then be asked of it."""
    return screen.matching(Description(element.nouns[0], element.colour)) == [element]


def random_change(rng: Random, before: Screen) -> tuple[Screen, str] | None:
    """A copy with one thing changed, and the sentence that says what; None where the change does not fit."""
    element = rng.choice(before.elements)
    others = [other for other in before.elements if other is not element]
    kind = rng.choice(("recoloured", "removed", "moved", "added"))
    if kind == "added":
        new = random_element(rng, before.style.size, list(before.elements))
        if new is None:
            return None
        after = replace(before, elements=(*before.elements, new))
        sentence = f"{drawing.with_article(new.name).capitalize()} was added {after.where(new)}."
        return (after, sentence) if is_unique(after, new) else None
    if kind == "removed":
        return replace(before, elements=tuple(others)), f"The {element.name} is gone."
    if kind == "recoloured":
        new = replace(element, colour=rng.choice([name for name in drawing.COLOURS if name != element.colour]))
        sentence = f"The {element.name} became {new.colour}."
    else:
        x1, y1, x2, y2 = element.box
        boxes = [other.box for other in others]
        box = drawing.free_box(rng, before.style.size, (x2 - x1, y2 - y1), boxes, TITLE_BAR)
        if box is None:
            return None
        new = replace(element, box=box)
        if new.regions(before.style.size) & element.regions(before.style.size):
            return None
        sentence = f"The {element.name} moved from {before.where(element)[3:]} to {before.where(new)[3:]}."
    after = replace(before, elements=(*others, new))
    return (after, sentence) if is_unique(after, new) else None
