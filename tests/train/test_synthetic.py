"""The built-in data, read back from its files as the trainer would: JSONL lines and PNG pixels."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from phi4rv.errors import UserError
from train.synthetic import records as records_module
from train.synthetic import tokenizer_corpus, write_dataset
from train.synthetic.charts import random_chart, random_scene
from train.synthetic.drawing import COLOURS, GLYPHS, Style, box_text, glyph, is_disjoint, region
from train.synthetic.screens import ICONS, KINDS, LABELS, Description, Element, Screen, random_change, random_screen

COUNT = 500
BOX = re.compile(r"<nothink>\[([01]\.\d\d), ([01]\.\d\d), ([01]\.\d\d), ([01]\.\d\d)\]")
COLOUR_NAMES = "|".join(COLOURS)


@pytest.fixture(scope="module", autouse=True)
def mixed_from_the_start() -> Iterator[None]:
    """Stage 2 without its easy beginning, which has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "CURRICULUM_RECORDS", 0)
        yield


def test_stage_2_begins_with_one_element_a_screen_but_held_out_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [records_module.make_record(2, "train", 0, index) for index in range(300)]
    heldout = [records_module.make_record(2, "heldout", 0, index) for index in range(300)]
    monkeypatch.setattr(records_module, "CURRICULUM_RECORDS", 200)
    for index in range(200):
        record = records_module.make_record(2, "train", 0, index)
        ((_, answer),) = record.turns
        (screen,) = record.images
        assert isinstance(screen, Screen) and len(screen.elements) == 1
        assert answer == screen.answer(screen.elements[0])
    assert [records_module.make_record(2, "train", 0, index) for index in range(200, 300)] == mixed[200:]
    assert [records_module.make_record(2, "heldout", 0, index) for index in range(300)] == heldout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages 1, 2 and 3, `COUNT` training records and 60 held out of each."""
    root = tmp_path_factory.mktemp("synthetic")
    for stage in (1, 2, 3):
        write_dataset(root, stage, "train", COUNT, seed=0)
        write_dataset(root, stage, "heldout", 60, seed=0)
    return root


def records(folder: Path, stage: int, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (folder / f"stage{stage}-{split}.jsonl").read_text().splitlines()]


def images(record: dict) -> list[str]:
    return [record["image"]] if isinstance(record["image"], str) else record["image"]


def turns(record: dict) -> list[tuple[str, str]]:
    (conversation,) = record["conversations"]
    assert [turn["from"] for turn in conversation] == ["human", "gpt"] * (len(conversation) // 2)
    values = [turn["value"] for turn in conversation]
    return list(zip(values[::2], values[1::2], strict=True))


def box(answer: str) -> np.ndarray | None:
    match = BOX.fullmatch(answer)
    return np.array([float(value) for value in match.groups()]) if match else None


def boxes(folder: Path, stage: int) -> list[tuple[str, np.ndarray]]:
    found = [(q, box(a)) for record in records(folder, stage) for q, a in turns(record)]
    return [(question, gold) for question, gold in found if gold is not None]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_same_arguments_same_bytes_and_another_seed_another(tmp_path: Path, stage: int) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_dataset(tmp_path / name, stage, "train", 12, seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    ours, theirs = digests(tmp_path / "a"), digests(tmp_path / "c")
    assert not set(ours.values()) & set(theirs.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_record_does_not_depend_on_count(tmp_path: Path, folder: Path, stage: int) -> None:
    path = write_dataset(tmp_path, stage, "train", 5, seed=0)
    assert path == tmp_path / f"stage{stage}-train.jsonl"
    assert path.read_text().splitlines() == (folder / path.name).read_text().splitlines()[:5]
    few, many = digests(tmp_path / "images"), digests(folder / "images")
    assert few and few.items() <= many.items()


def test_splits_share_no_picture(folder: Path) -> None:
    def pixels(split: str) -> set[bytes]:
        paths = [folder / p for stage in (1, 2, 3) for r in records(folder, stage, split) for p in images(r)]
        return {hashlib.sha256(path.read_bytes()).digest() for path in paths}

    train, heldout = pixels("train"), pixels("heldout")
    assert train and heldout and not train & heldout


def test_a_held_out_picture_differs_even_where_the_stream_is_the_same() -> None:
    for make in (random_screen, random_chart, random_scene):
        assert make(Random("x"), False).draw().tobytes() != make(Random("x"), True).draw().tobytes()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_format(folder: Path, stage: int, split: str) -> None:
    for record in records(folder, stage, split):
        assert set(record) == {"image", "conversations"}
        asked = [question for question, _ in turns(record)]
        assert sum(question.count("<image>") for question in asked) == len(images(record))
        assert "<image>" in asked[0] and not any("<image>" in answer for _, answer in turns(record))
        for path in images(record):
            with Image.open(folder / path) as image:
                width, height = image.size
                assert image.mode == "RGB" and image.format == "PNG"
            assert width % 16 == height % 16 == 0 and 56 <= width * height // 256 <= 64
        for _, answer in turns(record):
            thought = re.match(r"<nothink>(?=\S)|<think>([^<>]+)</think>(?=\S)", answer)
            assert thought, answer
            assert len((thought[1] or "").split()) <= 25
            assert ("[" in answer) == (box(answer) is not None), answer


@pytest.mark.parametrize("stage", [2, 3])
def test_boxes_lie_in_the_picture(folder: Path, stage: int) -> None:
    for question, (x1, y1, x2, y2) in boxes(folder, stage):
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, question


def test_boxes_enclose_their_colour(folder: Path) -> None:
    """Around an element named by its colour, the pixels of that colour reach to the box's edges, rounded."""
    checked = 0
    for record in records(folder, 2):
        pixels = np.asarray(Image.open(folder / record["image"])).astype(int)
        height, width = pixels.shape[:2]
        for question, answer in turns(record):
            colour = re.search(rf"the ({COLOUR_NAMES}) (button|field|window|.*icon)", question)
            gold = box(answer)
            if not colour or gold is None:
                continue
            near = np.abs(pixels - COLOURS[colour[1]]).max(axis=2) < 60
            x1, y1, x2, y2 = np.round(gold * [width, height, width, height]).astype(int)
            outer = slice(max(y1 - 3, 0), y2 + 3), slice(max(x1 - 3, 0), x2 + 3)
            rows, columns = np.nonzero(near[outer])
            rows, columns = rows + outer[0].start, columns + outer[1].start
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            slack = 3 if "icon" in question else 2  # a star's tips are faint
            assert np.abs(np.array(found) - [x1, y1, x2, y2]).max() <= slack, (record["image"], question)
            inside = near[y1:y2, x1:x2]
            outside = (near.sum() - inside.sum()) / (near.size - inside.size)
            assert inside.mean() > 0.15 and inside.mean() > outside
            checked += 1
    assert checked > 400


def test_boxes_are_written_with_two_decimals_within_the_picture() -> None:
    assert box_text((16, 64, 80, 96), (160, 128)) == "[0.10, 0.50, 0.50, 0.75]"
    assert box_text((-3, 0, 170, 128), (160, 128)) == "[0.00, 0.00, 1.00, 1.00]"


def test_every_kind_of_element_fills_its_box() -> None:
    style = Style((160, 128), dark=True, shade=40)
    plain = np.asarray(Screen(style, "Maps", ()).draw())
    kinds = [(kind, "Save", 11, "") for kind in KINDS[:3]] + [("icon", "", 25, name) for name in ICONS]
    for kind, label, size, shape in kinds:
        width, height = glyph(shape, size).size if shape else (52, 30)
        element = Element(kind, "red", (40, 50, 40 + width, 50 + height), label, size, shape)
        drawn = np.asarray(Screen(style, "Maps", (element,)).draw())
        rows, columns = np.nonzero((drawn != plain).any(axis=2))
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert found == element.box, element


def test_elements_keep_clear_of_each_other_and_of_the_title_bar() -> None:
    for seed in range(300):
        screen = random_screen(Random(seed), False)
        width, height = screen.style.size
        placed = [element.box for element in screen.elements]
        assert 1 <= len(placed) <= 5
        assert all(is_disjoint(a, b) for i, a in enumerate(placed) for b in placed[:i])
        assert all(b[0] >= 0 and b[1] >= 16 and b[2] <= width and b[3] <= height for b in placed)


def mentions(question: str, element: Element) -> bool:
    """Whether a question's own words could mean `element`: read from the words alone, places left out."""
    words = question.lower()
    if quoted := re.search(r"'(\w+)'", words):
        return quoted[1] == element.label.lower()
    colours = re.findall(COLOUR_NAMES, words)
    kind = re.search("|".join(KINDS), words)
    glyphs = re.findall("|".join(ICONS), words)
    return (
        (not colours or element.colour in colours)
        and kind is not None
        and kind[0] == element.kind
        and (not glyphs or element.shape in glyphs)
    )


def test_questions_have_one_right_answer() -> None:
    forms: Counter[str] = Counter()
    for seed in range(600):
        screen = random_screen(Random(seed), False)
        asked = screen.questions(Random(seed))
        assert len(asked) == len(screen.elements)
        for question, answer in asked:
            if given := re.search(r"\[.*\]", question):
                (named,) = [e for e in screen.elements if screen.answer(e) == f"<nothink>{given[0]}"]
                assert answer == f"<nothink>{named.name}"
                forms["naming"] += 1
                continue
            matching = [element for element in screen.elements if mentions(question, element)]
            where = re.search(r"(?:at|on|in) the ((?:top|bottom|left|right|centre)[ a-z]*)", question)
            if where:
                thirds = [region(*centre_of(element, screen)) for element in matching]
                matching = [e for e, third in zip(matching, thirds, strict=True) if third == where[1]]
            (element,) = matching
            assert screen.answer(element) == answer
            named = "colour" if re.search(COLOUR_NAMES, question) else "kind"
            forms["label" if "'" in question else "place" if where else named] += 1
    share = {form: number / forms.total() for form, number in forms.items()}
    assert 0.1 < share["naming"] < 0.2 and 0.4 < share["colour"] < 0.7 and 0.07 < share["label"] < 0.2
    assert 0.01 < share["place"] < 0.1 and 0.04 < share["kind"] < 0.2


def centre_of(element: Element, screen: Screen) -> tuple[float, float]:
    x1, y1, x2, y2 = element.box
    return (x1 + x2) / 2 / screen.style.size[0], (y1 + y2) / 2 / screen.style.size[1]


def test_a_name_that_fits_two_elements_is_not_used() -> None:
    style = Style((160, 128), dark=False, shade=240)
    top, bottom = (10, 20, 60, 40), (10, 100, 60, 120)
    red, blue = (Element("button", c, b, n, 11, "") for c, b, n in (("red", top, "Save"), ("blue", bottom, "Open")))
    screen = Screen(style, "Maps", (red, blue))
    assert screen.matching(Description("button")) == [red, blue]
    names = {str(screen.describe(Random(seed), red)) for seed in range(200)}
    assert names == {"the red button", "'Save'", "the button at the top left"}


def test_a_guess_without_the_picture_is_seldom_right(folder: Path) -> None:
    golds = np.array([gold for _, gold in boxes(folder, 2)])
    x1, y1, x2, y2 = golds.T
    areas = (x2 - x1) * (y2 - y1)
    assert 0.03 < areas.mean() < 0.07
    grid = np.linspace(0, 1, 41)
    scores = [((x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)).mean() for x in grid for y in grid]
    assert max(scores) < 0.15
    shuffled = np.random.default_rng(0).permutation(len(golds))
    x, y = (golds[shuffled, 0] + golds[shuffled, 2]) / 2, (golds[shuffled, 1] + golds[shuffled, 3]) / 2
    assert ((x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)).mean() < 0.09


def test_stage_2_mixes_grounding_and_reasoning(folder: Path) -> None:
    grounding = [box(turns(record)[0][1]) is not None for record in records(folder, 2)]
    assert 0.6 < np.mean(grounding) < 0.85  # the others describe, name or think
    final = Counter(answer.split("</think>")[-1] for r in records(folder, 2) for _, answer in turns(r))
    assert sum(bool(final[str(n)]) for n in range(11)) >= 6 and any(final[colour] for colour in COLOURS)


def test_stage_1_captions(folder: Path) -> None:
    starts = Counter()
    for record in records(folder, 1):
        ((question, answer),) = turns(record)
        assert question.startswith("<image>\n") and answer.startswith("<nothink>A ")
        starts[re.search("screen|bar chart|scene", answer)[0]] += 1
    assert set(starts) == {"screen", "bar chart", "scene"} and starts["screen"] > COUNT / 2


def test_stage_3_several_pictures_long_text_and_the_tasks_of_stage_2(folder: Path) -> None:
    several = long = 0
    for record in records(folder, 3):
        first = turns(record)[0][0]
        several += len(images(record)) > 1
        assert len(images(record)) <= 3
        if len(first.split()) > 100:
            long += 1
            assert 150 <= len(first.split("\n<image>\n")[0].split()) < 320
            facts = dict(re.findall(r"The code of (\w+) is (\d+)\.", first))
            ((city, code),) = [
                (m[1], a) for q, a in turns(record) if (m := re.search(r"What is the code of (\w+)\?", q))
            ]
            assert code == f"<nothink>{facts[city]}" and len(facts) == 4
            assert any(box(answer) is not None or "[" in question for question, answer in turns(record))
    assert 0.1 < several / COUNT < 0.25 and 0.04 < long / COUNT < 0.13


def test_which_picture_is_the_one_that_has_it(folder: Path) -> None:
    """Checked on pixels: the box given for "Where is it?" holds the colour in the picture answered."""
    seen = 0
    for record in records(folder, 3):
        asked = turns(record)
        if "icture is there" not in asked[0][0] and "Which picture" not in asked[0][0]:
            continue
        ordinal = re.search(r"The (first|second|third) picture\.$", asked[0][1])[1]
        colour = re.search(COLOUR_NAMES, asked[0][0])[0]
        number = ("first", "second", "third").index(ordinal)
        pixels = np.asarray(Image.open(folder / images(record)[number])).astype(int)
        height, width = pixels.shape[:2]
        x1, y1, x2, y2 = np.round(box(asked[1][1]) * [width, height, width, height]).astype(int)
        assert (np.abs(pixels - COLOURS[colour]).max(axis=2) < 60)[y1:y2, x1:x2].mean() > 0.15
        seen += 1
    assert seen > 10


def test_a_change_is_what_the_sentence_says() -> None:
    said = Counter()
    for seed in range(200):
        before = random_screen(Random(seed), False)
        if (changed := random_change(Random(seed), before)) is None:
            continue
        after, sentence = changed
        gone, new = set(before.elements) - set(after.elements), set(after.elements) - set(before.elements)
        assert max(len(gone), len(new)) == 1
        (old,) = gone or {None}
        (now,) = new or {None}
        if old is None:
            expected = rf"An? {now.name} was added .*{region(*centre_of(now, after))}\."
        elif now is None:
            expected = f"The {old.name} is gone\\."
        elif old.colour != now.colour:
            expected = f"The {old.name} became {now.colour}\\."
        else:
            expected = (
                f"The {old.name} moved from the {region(*centre_of(old, before))} "
                f"to the {region(*centre_of(now, after))}\\."
            )
        assert re.fullmatch(expected, sentence), sentence
        said[re.search("added|gone|became|moved", sentence)[0]] += 1
    assert min(said[word] for word in ("added", "gone", "became", "moved")) > 10


def test_colours_are_told_apart() -> None:
    values = [np.array(rgb) for rgb in COLOURS.values()]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(values) for b in values[:i]]
    assert min(distances) > 70


def test_texts_cover_the_vocabulary_of_every_stage() -> None:
    written = list(tokenizer_corpus(count=120, seed=3))
    assert written == list(tokenizer_corpus(count=120, seed=3)) != list(tokenizer_corpus(count=120, seed=4))
    together = " ".join(written)
    words = (
        *LABELS,
        *COLOURS,
        *GLYPHS,
        *KINDS,
        "<think>",
        "</think>",
        "<nothink>",
        "caption",
        "changed",
        "code",
    )
    assert [word for word in words if word not in together] == []


@pytest.mark.parametrize(
    ("stage", "split", "count", "told"),
    [(4, "train", 1, "stage 4"), (2, "test", 1, "train, heldout"), (2, "train", 0, "count 0")],
)
def test_bad_arguments_are_named(tmp_path: Path, stage: int, split: str, count: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_dataset(tmp_path, stage, split, count, seed=0)
    assert not list(tmp_path.iterdir())
