"""Records of the three stages, and the folder they are written to.

The stages follow section 2 of the Phi-4-reasoning-vision report: captions; grounding and reasoning over one
image; several images and long text. The format is that of its figure 4.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from phi4rv.errors import UserError
from train.synthetic import drawing
from train.synthetic.charts import Chart, Scene, random_chart, random_scene
from train.synthetic.screens import Description, Screen, location_question, random_change, random_screen

STAGES = (1, 2, 3)
CURRICULUM_RECORDS = 6500  # training records of stage 2 that come first and show one element each
SPLITS = ("train", "heldout")
BRIEF_REQUESTS = ("Describe the picture.", "What is in the picture?", "Write a caption.")
DETAILED_REQUESTS = ("Describe the picture in detail.", "What is where in the picture?")
CITIES = ("Berlin", "Paris", "Rome", "Oslo", "Madrid", "Lima", "Cairo", "Tokyo")
PEOPLE = ("Ann", "Bob", "Eva", "Jim", "Zoe", "Tom")
VERBS = ("keeps", "wants", "paints", "needs", "moves", "finds", "sells")
THINGS = (
    "the old map",
    "a long letter",
    "the small table",
    "two chairs",
    "the garden gate",
    "a box of tools",
)
TIMES = ("in the morning", "after lunch", "every Monday", "before the meeting", "at night", "in spring")


@dataclass(frozen=True)
class Record:
    """One conversation: `turns` are (question, answer), with one `<image>` for each of `images`."""

    images: tuple[drawing.Drawable, ...]
    turns: list[tuple[str, str]]


def make_record(stage: int, split: str, seed: int, index: int) -> Record:
    """Record `index` of a split: a function of its arguments alone, whatever else is generated."""
    rng = Random(f"{seed}/{stage}/{split}/{index}")  # a string is seeded through SHA-512, alike everywhere
    heldout = split == "heldout"
    if stage == 1:
        return caption_record(rng, heldout)
    if stage == 2 and not heldout and index < CURRICULUM_RECORDS:
        return curriculum_record(rng)
    if stage == 2 or rng.random() < 0.75:  # in stage 3 too, against forgetting
        return single_image_record(rng, heldout)
    several = (difference_record, which_image_record, nth_image_record, long_text_record)
    return rng.choices(several, (1, 1, 2, 2))[0](rng, heldout)


def curriculum_record(rng: Random) -> Record:
    """A screen with a single element, and where it is: a curriculum (Bengio et al. 2009), as a model that sees several
    elements from the start does not learn to locate any.
    """
    screen = random_screen(rng, heldout=False, max_elements=1)
    (element,) = screen.elements
    question = location_question(rng, screen.describe(rng, element))
    return Record((screen,), with_opening("<image>\n", [(question, screen.answer(element))]))


def caption_record(rng: Random, heldout: bool) -> Record:
    image = random_image(rng, heldout)
    return Record((image,), with_opening("<image>\n", [caption_turn(rng, image)]))


def single_image_record(rng: Random, heldout: bool) -> Record:
    """Questions. A tenth of the training images are captioned first, as the report does in records of their own."""
    image = random_image(rng, heldout)
    described = not heldout and rng.random() < 0.1
    turns = [caption_turn(rng, image)] if described else []
    return Record((image,), with_opening("<image>\n", turns + image.questions(rng)))


def random_image(rng: Random, heldout: bool) -> Screen | Chart | Scene:
    make = rng.choices((random_screen, random_chart, random_scene), (90, 5, 5))[0]
    return make(rng, heldout)


def caption_turn(rng: Random, image: Screen | Chart | Scene) -> tuple[str, str]:
    detailed = rng.random() < 0.5
    return rng.choice(DETAILED_REQUESTS if detailed else BRIEF_REQUESTS), "<nothink>" + image.caption(detailed)


def difference_record(rng: Random, heldout: bool) -> Record:
    """Two screens that differ in one thing."""
    while True:
        before = random_screen(rng, heldout, min_elements=2)
        if changed := random_change(rng, before):
            break
    after, sentence = changed
    question = rng.choice(
        (
            "First <image> then <image>: what changed?",
            "<image>\n<image>\nWhat changed from the first picture to the second?",
            "Before: <image>\nAfter: <image>\nWhat is different?",
        )
    )
    return Record((before, after), [(question, f"<nothink>{sentence}")])


def which_image_record(rng: Random, heldout: bool) -> Record:
    """Two or three screens, one of which has the element asked for; then where it is."""
    while True:
        screens = [random_screen(rng, heldout) for _ in range(rng.randint(2, 3))]
        number = rng.randrange(len(screens))
        element = rng.choice(screens[number].elements)
        wanted = Description(rng.choice(element.nouns), element.colour)
        if [len(screen.matching(wanted)) for screen in screens] == [int(i == number) for i in range(len(screens))]:
            break
    screen, ordinal = screens[number], drawing.ORDINALS[number]
    thought = f"{str(wanted).capitalize()} is {screen.where(element)} of the {ordinal} picture."
    answer = (f"<think>{thought}</think>" if rng.random() < 0.5 else "<nothink>") + f"The {ordinal} picture."
    thing = drawing.with_article(str(wanted).removeprefix("the "))
    marks = " ".join(["<image>"] * len(screens))
    question = rng.choice(("In which picture is there {}? {}", "{1}\nWhich picture has {0}?")).format(thing, marks)
    return Record(tuple(screens), [(question, answer), ("Where is it?", screen.answer(element))])


def nth_image_record(rng: Random, heldout: bool) -> Record:
    """Two or three screens and questions of where something is in one of them."""
    screens = [random_screen(rng, heldout, min_elements=2) for _ in range(rng.randint(2, 3))]
    turns = []
    for screen, ordinal in zip(screens, drawing.ORDINALS, strict=False):
        for element in rng.sample(screen.elements, 2):
            where = f" in the {ordinal} picture"
            turns.append((location_question(rng, screen.describe(rng, element), where), screen.answer(element)))
    rng.shuffle(turns)
    return Record(tuple(screens), with_opening("<image>\n" * len(screens), turns))


def long_text_record(rng: Random, heldout: bool) -> Record:
    """A page of 150 to 300 words with a few facts in it, then a screen: questions on both."""
    facts = dict(zip(rng.sample(CITIES, 4), rng.sample(range(10, 100), 4), strict=True))
    words = rng.randint(150, 300)
    sentences = [f"The code of {city} is {code}." for city, code in facts.items()]
    while sum(len(sentence.split()) for sentence in sentences) < words:
        person, verb, thing, time = (rng.choice(part) for part in (PEOPLE, VERBS, THINGS, TIMES))
        sentences.append(f"{person} {verb} {thing} {time}.")
    rng.shuffle(sentences)
    city = rng.choice(list(facts))
    screen = random_screen(rng, heldout)
    turns = screen.questions(rng)
    turns.insert(rng.randint(0, len(turns)), (f"What is the code of {city}?", f"<nothink>{facts[city]}"))
    return Record((screen,), with_opening(" ".join(sentences) + "\n<image>\n", turns))


def with_opening(opening: str, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same turns, with `opening` before the first question."""
    (question, answer), *rest = turns
    return [(opening + question, answer), *rest]


def write_dataset(folder: Path, stage: int, split: str, count: int, seed: int) -> Path:
    """Writes `folder`/stage{stage}-{split}.jsonl, and PNGs below `folder`/images; returns the JSONL's path.

    The same arguments write the same bytes, a record does not depend on `count`, and "train" and "heldout"
    share no image. Paths in the JSONL are relative to its folder.

    Raises:
        UserError: an unknown stage or split, or a count below one.
    """
    if stage not in STAGES:
        raise UserError(f"stage {stage}: built-in data exists for stages 1, 2 and 3")
    if split not in SPLITS:
        raise UserError(f"split {split!r}: one of {', '.join(SPLITS)}")
    if count < 1:
        raise UserError(f"count {count}: a dataset holds at least 1 record")
    name = f"stage{stage}-{split}"
    (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        record = make_record(stage, split, seed, index)
        paths = []
        for number, image in enumerate(record.images):
            paths.append(f"images/{name}/{index:06}-{number}.png")
            image.draw().save(folder / paths[-1], compress_level=1)
        lines.append(json.dumps(as_json(record, paths)) + "\n")
    path = folder / f"{name}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def as_json(record: Record, paths: list[str]) -> dict[str, object]:
    """The report's record format, its figure 4."""
    turns = []
    for question, answer in record.turns:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": paths[0] if len(paths) == 1 else paths, "conversations": [turns]}


def tokenizer_corpus(count: int = 500, seed: int = 0) -> Iterator[str]:
    """The questions and answers of `count` training records of each stage, to train a tokenizer on."""
    for stage in STAGES:
        for index in range(count):
            for question, answer in make_record(stage, "train", seed, index).turns:
                yield question
                yield answer
