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
TITLE_BAR = drawing.SNAP  # pixels
HEADER = 13  # pixels of a window's own title
NEAR = 0.04  # of the picture: a centre this close to another third counts as lying in both

QUESTIONS = ("Where is {}?", "Where is {}?", "Find {}.", "Locate {}.", "Click {}.", "Give me the box of {}.")
NAMING = 0.1  # share of the elements that are shown and to be named, not named and to be found
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

    def places(self, size: tuple[int, int]) -> set[str]:
        """Every place that this element could be said to be in."""
        x, y = drawing.centre(self.box, size)
        return {drawing.place(x + dx, y + dy) for dx in (-NEAR, 0, NEAR) for dy in (-NEAR, 0, NEAR)}


@dataclass(frozen=True)
class Description:
    """A way to name an element; an empty part says nothing."""

    noun: str = ""
    colour: str = ""
    place: str = ""
    label: str = ""

    def fits(self, element: Element, size: tuple[int, int]) -> bool:
        return (
            (not self.noun or self.noun in element.nouns)
            and (not self.colour or self.colour == element.colour)
            and (not self.label or self.label == element.label)
            and (not self.place or self.place in element.places(size))
        )

    def __str__(self) -> str:
        if self.label:
            return f"'{self.label}'"
        where = drawing.at_place(self.place) if self.place else ""
        return " ".join(part for part in ("the", self.colour, self.noun, where) if part)


@dataclass(frozen=True)
class Screen:
    style: drawing.Style
    title: str
    elements: tuple[Element, ...]

    def fitting(self, description: Description) -> list[Element]:
        return [element for element in self.elements if description.fits(element, self.style.size)]

    def name_for(self, rng: Random, element: Element) -> Description:
        """A random way to name `element` that fits no other; that of colour and kind always exists."""
        places = element.places(self.style.size)
        ways = [(20.0, Description(label=element.label))] if element.label else []
        for noun in element.nouns:
            share = 1 / len(element.nouns)
            ways += [(65 * share, Description(noun, element.colour)), (10 * share, Description(noun))]
            if len(places) == 1:
                ways.append((5 * share, Description(noun, place=min(places))))
        sure = [(weight, way) for weight, way in ways if self.fitting(way) == [element]]
        return rng.choices([way for _, way in sure], [weight for weight, _ in sure])[0]

    def questions(self, rng: Random) -> list[tuple[str, str]]:
        """One turn for each element, in random order: (question, answer). Where it is, or what is there."""
        elements = rng.sample(self.elements, len(self.elements))
        return [
            (self.ask_name(rng, element), f"<nothink>{element.name}")
            if rng.random() < NAMING
            else (ask(rng, self.name_for(rng, element)), self.answer(element))
            for element in elements
        ]

    def ask_name(self, rng: Random, element: Element) -> str:
        return rng.choice(NAMING_QUESTIONS).format(drawing.normalised(element.box, self.style.size))

    def answer(self, element: Element) -> str:
        return "<nothink>" + drawing.normalised(element.box, self.style.size)

    def in_reading_order(self) -> Iterator[Element]:
        boxes = [element.box for element in self.elements]
        return (self.elements[i] for i in drawing.reading_order(boxes, self.style.size))

    def where(self, element: Element) -> str:
        return drawing.at_place(drawing.place(*drawing.centre(element.box, self.style.size)))

    def caption(self, detailed: bool) -> str:
        parts = []
        for element in self.in_reading_order():
            label = f" '{element.label}'" if element.label else ""
            part = drawing.article(element.name)
            parts.append(f"{part}{label} {self.where(element)}" if detailed else part)
        look = ("dark " if self.style.dark else "light ") if detailed else ""
        return f"A {look}screen with {drawing.listed(parts)}."

    def draw(self) -> Image.Image:
        image = self.style.canvas()
        pen = ImageDraw.Draw(image)
        pen.rectangle((0, 0, self.style.size[0] - 1, TITLE_BAR - 1), fill=self.style.line)
        drawing.write(pen, (4, TITLE_BAR / 2), self.title, 10, self.style.ink, "lm")
        for element in self.elements:
            draw_element(image, pen, element, self.style)
        return image


def ask(rng: Random, description: Description, where: str = "") -> str:
    """`where` names the picture if there are several: " in the second picture"."""
    return rng.choice(QUESTIONS).format(f"{description}{where}")


def draw_element(image: Image.Image, pen: ImageDraw.ImageDraw, element: Element, style: drawing.Style) -> None:
    colour, label, size = drawing.COLOURS[element.colour], element.label, element.size
    x1, y1, x2, y2 = element.box
    whole = (x1, y1, x2 - 1, y2 - 1)  # Pillow's rectangles include their last pixel
    middle = (y1 + y2) / 2
    if element.kind == "button":
        pen.rounded_rectangle(whole, 4, fill=colour)
        drawing.write(pen, ((x1 + x2) / 2, middle), label, size, drawing.contrast(colour), "mm")
    elif element.kind == "field":
        pen.rectangle(whole, fill=drawing.mixed(style.paper, colour, 0.3), outline=colour, width=2)
        drawing.write(pen, (x1 + 5, middle), label, size, style.ink, "lm")
        caret = x1 + 7 + drawing.text_width(label, size)
        pen.line((caret, y1 + 5, caret, y2 - 6), fill=colour)
    elif element.kind == "window":
        pen.rectangle(whole, fill=style.paper, outline=colour)
        pen.rectangle((x1, y1, x2 - 1, y1 + HEADER - 1), fill=colour)
        drawing.write(pen, (x1 + 4, y1 + HEADER / 2), label, size, drawing.contrast(colour), "lm")
        for row, y in enumerate(range(y1 + HEADER + 4, y2 - 4, 5)):
            pen.line((x1 + 5, y, x2 - 6 - 7 * (row % 2), y), fill=style.line)
    else:
        drawing.stamp(image, element.shape, size, element.colour, (x1, y1))


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
            shape = (drawing.rounded_up(width + (6 if kind == "button" else 12), 8), drawing.SNAP)
    box = drawing.free_spot(rng, area, shape, [other.box for other in others], TITLE_BAR)
    return Element(kind, colour, box, label, size, glyph) if box else None


def random_screen(rng: Random, heldout: bool, fewest: int = 1, most: int = 5) -> Screen:
    """A screen of ``fewest`` to ``most`` elements, no two of one colour and kind."""
    style, title = drawing.random_style(rng, heldout), rng.choice(TITLES)
    while True:
        elements: list[Element] = []
        for _ in range(rng.randint(fewest, most)):
            if element := random_element(rng, style.size, elements):
                elements.append(element)
        screen = Screen(style, title, tuple(elements))
        if len(elements) >= fewest and all(singled_out(screen, element) for element in elements):
            return screen


def singled_out(screen: Screen, element: Element) -> bool:
    """Whether colour and noun alone name one element: the plainest question can then be asked of it."""
    return screen.fitting(Description(element.nouns[0], element.colour)) == [element]


def change(rng: Random, before: Screen) -> tuple[Screen, str] | None:
    """A copy with one thing changed, and the sentence that says what; None where the change does not fit."""
    element = rng.choice(before.elements)
    others = [other for other in before.elements if other is not element]
    kind = rng.choice(("recoloured", "removed", "moved", "added"))
    if kind == "added":
        new = random_element(rng, before.style.size, list(before.elements))
        if new is None:
            return None
        after = replace(before, elements=(*before.elements, new))
        said = f"{drawing.article(new.name).capitalize()} was added {after.where(new)}."
        return (after, said) if singled_out(after, new) else None
    if kind == "removed":
        return replace(before, elements=tuple(others)), f"The {element.name} is gone."
    if kind == "recoloured":
        new = replace(element, colour=rng.choice([name for name in drawing.COLOURS if name != element.colour]))
        said = f"The {element.name} became {new.colour}."
    else:
        x1, y1, x2, y2 = element.box
        boxes = [other.box for other in others]
        box = drawing.free_spot(rng, before.style.size, (x2 - x1, y2 - y1), boxes, TITLE_BAR)
        if box is None:
            return None
        new = replace(element, box=box)
        if new.places(before.style.size) & element.places(before.style.size):
            return None
        said = f"The {element.name} moved from {before.where(element)[3:]} to {before.where(new)[3:]}."
    after = replace(before, elements=(*others, new))
    return (after, said) if singled_out(after, new) else None
