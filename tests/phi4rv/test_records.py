"""Training records: the report's own examples, LLaVA's form, and one error for each way to be wrong."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from phi4rv.errors import UserError
from phi4rv.processing.chat_template import ChatTemplate, Message
from phi4rv.processing.records import Record, read_records

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-checkpoint"
IMAGE = "images/1_0.png"
HUMAN = {"from": "human", "value": "Where?"}
GPT = {"from": "gpt", "value": "<nothink>[0.1, 0.2, 0.3, 0.4]"}
MARKED = {"from": "human", "value": "Where?\n\n<image>"}
TURNS = [Message("user", "Where?"), Message("assistant", "<nothink>[0.1, 0.2, 0.3, 0.4]")]


def write(folder: Path, *lines: str | bytes | dict, name: str = "data.jsonl") -> Path:
    encoded = [
        line
        if isinstance(line, bytes)
        else (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)).encode()
        for line in lines
    ]
    content = b"".join(line + b"\n" for line in encoded)
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(path: Path, **options: Any) -> list[Record]:
    return list(read_records(path, image_root=CHECKPOINT, **options))


def test_the_reports_two_examples(tmp_path: Path) -> None:
    first = {
        "image": IMAGE,
        "conversations": [[MARKED, {"from": "gpt", "value": "<notthink>[0.5830, 0.1090]"}]],
    }
    second = {
        "image": "images/2_0.png",
        "conversations": [[HUMAN, {"from": "gpt", "value": "<think>Look.\n\n</think>Dubai"}]],
    }
    path = write(tmp_path, first, second)
    assert read(path) == [
        Record(
            [CHECKPOINT / IMAGE],
            [Message("user", "Where?\n\n<image>"), Message("assistant", "<notthink>[0.5830, 0.1090]")],
            f"{path}:1",
        ),
        # No mark for its one image: it goes in front.
        Record(
            [CHECKPOINT / "images/2_0.png"],
            [Message("user", "<image>\nWhere?"), Message("assistant", "<think>Look.\n\n</think>Dubai")],
            f"{path}:2",
        ),
    ]


def test_records_render(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": IMAGE, "conversations": [[HUMAN, GPT, HUMAN, GPT]]})
    template = ChatTemplate((CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8"))
    rendered = template.render(read(path)[0].turns, add_generation_prompt=False)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [GPT["value"] + "<|im_end|>"] * 2


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_forms_that_are_read(tmp_path: Path, name: str) -> None:
    both = {"from": "human", "value": "<image><image> é"}
    path = write(
        tmp_path,
        {"conversations": [HUMAN, GPT], "id": 7},
        "",
        "  \r",
        {"image": None, "conversations": [[HUMAN, GPT]]},
        {"image": [], "conversations": [[HUMAN, GPT]]},
        {"image": [IMAGE, "images/2_0.png"], "conversations": [[both, GPT]]},
        {"image": IMAGE, "conversations": [[MARKED, GPT], [HUMAN, GPT, HUMAN, GPT]]},
        {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]},
        {"image": IMAGE, "conversations": [HUMAN, GPT, MARKED, GPT]},
        name=name,
    )
    records = read(path)
    assert [int(record.where.removeprefix(f"{path}:")) for record in records] == [1, 4, 5, 6, 7, 7, 8, 9]
    assert [len(record.images) for record in records] == [0, 0, 0, 2, 1, 1, 0, 1]
    assert records[0].turns == records[1].turns == records[2].turns == TURNS
    assert records[3].turns[0] == Message("user", "<image><image> é")
    assert records[5].turns == [Message("user", "<image>\nWhere?"), TURNS[1], *TURNS]
    assert records[6].turns == [Message("system", "Be brief."), *TURNS]
    assert records[7].turns[0] == TURNS[0]


def test_the_last_line_may_lack_its_line_break(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": [HUMAN, GPT]}), encoding="utf-8")
    assert read(path)[0].turns == TURNS


def test_image_paths(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"x")
    (tmp_path / "deep").mkdir()
    lines = [{"image": name, "conversations": [HUMAN, GPT]} for name in ("../a b.png", str(tmp_path / "a b.png"))]
    path = write(tmp_path / "deep", *lines)
    assert [record.images for record in read_records(path)] == [
        [tmp_path / "deep" / "../a b.png"],
        [tmp_path / "a b.png"],
    ]


def conversation(*turns: Any, **keys: Any) -> dict:
    return {"conversations": [list(turns)], **keys}


def answer(value: str) -> dict:
    return conversation(HUMAN, {"from": "gpt", "value": value})


BAD = {
    "broken JSON": ('{"conversations": [', r"broken JSON at column \d+"),
    "two objects": ("{} {}", "broken JSON at column 4"),
    "not an object": ("[1]", "a list where a record belongs"),
    "a number": ("3", "a number where a record belongs"),
    "too deep": ("[" * 200_000, "nested too deeply"),
    "too long a number": ('{"x": ' + "1" * 5000 + "}", "a number too long"),
    "NaN": ('{"conversations": [], "x": NaN}', "NaN is not JSON"),
    "-Infinity": ('{"conversations": [], "x": [-Infinity]}', "-Infinity is not JSON"),
    "UTF-8": (b'{"conversations": "\xff"}', "byte 20 is not UTF-8"),
    "no conversations": ({"image": IMAGE}, "'conversations' is missing"),
    "conversations a string": ({"conversations": "x"}, "'conversations' is a string"),
    "conversations null": ({"conversations": None}, "'conversations' is null"),
    "conversations empty": ({"conversations": []}, "'conversations' is an empty list"),
    "conversation empty": ({"conversations": [[]]}, "the conversation is an empty list"),
    "second empty": ({"conversations": [[HUMAN, GPT], []]}, "conversation 2: the conversation is an empty"),
    "mixed": ({"conversations": [[HUMAN, GPT], HUMAN]}, "conversation 2: the conversation is an object"),
    "turn a string": (conversation("x"), "turn 1 is a string"),
    "no from": (conversation({"value": "x"}, GPT), "turn 1: 'from' is missing"),
    "no value": (conversation(HUMAN, {"from": "gpt"}), "turn 2: 'value' is missing"),
    "unknown role": (conversation({"from": "user", "value": "x"}, GPT), "turn 1 is from 'user'.*human, gpt"),
    "role a list": (conversation({"from": [], "value": "x"}, GPT), r"turn 1 is from \[\]"),
    "value a number": (answer(3), "turn 2: 'value' is a number"),  # type: ignore[arg-type]
    "value empty": (answer(""), "turn 2: 'value' is an empty string"),
    "value blank": (answer(" \n"), "turn 2: 'value' is an empty string"),
    "value false": (answer(False), "turn 2: 'value' is a boolean"),  # type: ignore[arg-type]
    "surrogate": ('{"conversations": [{"from": "human", "value": "\\ud800"}]}', "turn 1: half a surrogate"),
    "gpt first": (
        conversation(GPT, HUMAN),
        "turn 1 is from gpt; human and gpt alternate, so here comes human",
    ),
    "human twice": (conversation(HUMAN, HUMAN, GPT), "turn 2 is from human again; .* comes gpt"),
    "gpt twice": (conversation(HUMAN, GPT, GPT), "turn 3 is from gpt again; .* comes human"),
    "human last": (conversation(HUMAN, GPT, HUMAN), "the last turn is from human"),
    "system alone": (conversation({"from": "system", "value": "x"}), "the last turn is from system"),
    "system late": (conversation(HUMAN, GPT, {"from": "system", "value": "x"}, GPT), "turn 3 is from system"),
    "mark in gpt": (
        conversation(HUMAN, {"from": "gpt", "value": "<image>"}, image=IMAGE),
        "<image> mark in a gpt",
    ),
    "mark in system": (
        conversation({"from": "system", "value": "<image>"}, HUMAN, GPT, image=IMAGE),
        "<image> mark in a system",
    ),
    "mark without image": (conversation(MARKED, GPT), "<image> marks: 1, images: 0"),
    "two marks": (conversation(MARKED, GPT, MARKED, GPT, image=IMAGE), "<image> marks: 2, images: 1"),
    "one mark": (conversation(MARKED, GPT, image=[IMAGE, IMAGE]), "<image> marks: 1, images: 2"),
    "no mark": (conversation(HUMAN, GPT, image=[IMAGE, IMAGE]), "<image> marks: 0, images: 2"),
    "nan box": (answer("<nothink>[nan, 0.1, 0.2, 0.3]"), r"turn 2: \[nan, 0.1, 0.2, 0.3\] is not a place"),
    "inf box": (answer("so [0.1, 0.2, Inf, 0.3]"), r"turn 2: \[0.1, 0.2, Inf, 0.3\] is not a place"),
    "image missing": (conversation(MARKED, GPT, image="none.png"), "no image file at '.*none.png'"),
    "image a folder": (conversation(MARKED, GPT, image="images"), "no image file at '.*images'"),
    "image NUL": (conversation(MARKED, GPT, image="a\0b"), "no image file at"),
    "image empty": (conversation(MARKED, GPT, image=""), "'image' has an empty string in it"),
    "image a number": (conversation(MARKED, GPT, image=3), "'image' has a number in it"),
    "image null in list": (conversation(MARKED, GPT, image=[None]), "'image' has null in it"),
    "image an object": (conversation(MARKED, GPT, image={"path": "x"}), "'image' has an object in it"),
}


@pytest.mark.parametrize(("line", "error"), BAD.values(), ids=BAD)
def test_bad_lines_name_file_and_line(tmp_path: Path, line: str | bytes | dict, error: str) -> None:
    path = write(tmp_path, conversation(HUMAN, GPT), "", line)
    records = read_records(path, image_root=CHECKPOINT)
    assert next(records).turns == TURNS
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:3: .*{error}") as caught:
        next(records)
    assert "; " in str(caught.value) and "\n" not in str(caught.value)


def test_skip_bad_reports_each_and_reads_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = conversation(HUMAN, GPT)
    lines = [part for line, _ in BAD.values() for part in (line, good)]
    path = write(tmp_path, *lines)
    reports: list[str] = []
    records = read(path, skip_bad=True, on_bad=reports.append)
    assert [record.where for record in records] == [f"{path}:{2 * n}" for n in range(1, len(BAD) + 1)]
    assert len(reports) == len(BAD)
    for number, (report, (_, error)) in enumerate(zip(reports, BAD.values(), strict=True)):
        assert re.match(f"{re.escape(str(path))}:{2 * number + 1}: .*{error}", report)
    assert capsys.readouterr().err == ""
    assert len(read(write(tmp_path, good, "x"), skip_bad=True)) == 1
    assert re.match(r"skipped: .*data.jsonl:2: broken JSON at column 1", capsys.readouterr().err)


def test_a_bad_conversation_takes_its_whole_line(tmp_path: Path) -> None:
    path = write(tmp_path, {"conversations": [[HUMAN, GPT], [HUMAN]]}, conversation(HUMAN, GPT))
    reports: list[str] = []
    assert [record.where for record in read(path, skip_bad=True, on_bad=reports.append)] == [f"{path}:2"]
    assert len(reports) == 1 and ":1: conversation 2: the last turn" in reports[0]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("lines", [(), ("", "  ")], ids=["empty", "blank"])
def test_no_records(tmp_path: Path, name: str, lines: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"data.jsonl.*: no records, it is empty"):
        read(write(tmp_path, *lines, name=name), skip_bad=True)


def test_no_good_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records, all 2 lines are bad"):
        read(write(tmp_path, "x", "y"), skip_bad=True, on_bad=lambda message: None)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_broken_gzip(tmp_path: Path, skip_bad: bool) -> None:
    path = write(tmp_path, *[answer(f"{n * 7919 % 10007}") for n in range(3000)], name="data.jsonl.gz")
    whole = path.read_bytes()
    assert len(read(path)) == 3000
    damaged = bytearray(whole)
    damaged[-8] ^= 1  # the checksum
    for content in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:5],
        b'{"conversations": []}',
        bytes(damaged),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"data.jsonl.gz: the gzip stream is broken \(.+\); "):
            read(path, skip_bad=skip_bad, on_bad=lambda message: None)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read: No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read(tmp_path)
