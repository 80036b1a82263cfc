"""``python -m infer.main``: what it prints, what it draws, and one line for everything that is wrong."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

import phi4rv
from infer.engine.input_batch import InputBatch
from infer.main import main
from phi4rv.processing.answers import parse_answer
from phi4rv.processing.processor import Prompt
from tests.small import ROOT, picture, small_checkpoint, small_model

END = 1011
BOXES = "<think>It lies there.</think>Here: [0.25, 0.5, 0.75, 1.0], and [0.0, 0.0, 0.1, 0.255]."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("model"), context=256)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / picture(tmp_path, "a.png", 200, 100)


def script(monkeypatch: pytest.MonkeyPatch, *texts: str | list[int]) -> list[list[int]]:
    """Makes the model answer ``texts``, one for each prompt, and stop. Returns their token ids."""
    encode = small_model()[1].tokenizer.encode
    wanted = [text if isinstance(text, list) else encode(text, add_special_tokens=False).ids for text in texts]
    rows = torch.full((len(wanted), 256), END)
    for row, ids in zip(rows, wanted, strict=True):
        row[: len(ids)] = torch.tensor(ids)

    def sample_one(
        batch: InputBatch, req_indices: torch.Tensor, logits: torch.Tensor, seen: object, index: torch.Tensor
    ) -> torch.Tensor:
        return rows[req_indices, index]  # indices are assigned in the prompts' order

    monkeypatch.setattr("infer.engine.input_batch.InputBatch._sample_one", sample_one)
    return wanted


class Pieces(io.StringIO):
    """Standard output that remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def shown(text: str) -> str:
    """What is printed of an answer of this text."""
    answer = parse_answer(text)
    if answer.thinking is None:
        return answer.text + "\n"
    return f"<think>\n{answer.thinking}\n</think>\n" + (answer.text and answer.text + "\n")


def ask(checkpoint: Path, *arguments: object) -> int:
    return main(["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize(
    "text",
    ["größer — 漢字 😀 done", "😀", "", "<|dummy_84|>[0.1, 0.2]", "<think>a</think>\n\n b", "<think>a b"],
    ids=["mixed", "emoji", "empty", "special", "thinking", "no end of the thought"],
)
def test_the_stream_is_the_answer(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, text: str) -> None:
    [ids] = script(monkeypatch, text)
    out = Pieces()
    monkeypatch.setattr(sys, "stdout", out)
    assert ask(checkpoint, "--prompt", "Hi") == 0
    assert small_model()[1].decode(ids) == text
    assert out.getvalue() == shown(text)
    assert "\N{REPLACEMENT CHARACTER}" not in out.getvalue()
    written = [piece for piece in out.pieces if piece.strip()]
    assert len(text) < 2 or len(written) > 1, "printed at the end only"


def test_the_stream_of_broken_characters(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """Half a character in the middle and at the end: as the tokenizer's own decoder shows it."""
    encode = small_model()[1].tokenizer.encode
    emoji = encode("😀", add_special_tokens=False).ids
    assert len(emoji) > 2
    ids = [*emoji[:2], *encode("ok").ids, *emoji, *emoji[:-1]]
    script(monkeypatch, ids)
    out = Pieces()
    monkeypatch.setattr(sys, "stdout", out)
    assert ask(checkpoint, "--prompt", "Hi") == 0
    assert out.getvalue() == shown(small_model()[1].decode(ids))
    assert "ok😀" in out.getvalue()


def test_json_has_the_named_fields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, image: Path
) -> None:
    [ids] = script(monkeypatch, BOXES)
    assert ask(checkpoint, "--prompt", "<image>\nWhere?", "--image", image, "--json") == 0
    [line] = capsys.readouterr().out.splitlines()
    made = json.loads(line)
    assert {k: v for k, v in made.items() if k not in ("timing", "normalized_boxes")} == {
        "text": BOXES.split("</think>")[1],
        "thinking": "It lies there.",
        "token_ids": ids,
        "prompt_tokens": len(small_model()[1].encode(Prompt("<image>\nWhere?", [image]))),
        "cached_tokens": 0,
        "image_tokens": 8,  # 200 x 100 in at most 12 patches: 2 x 4
        "finish_reason": "stop",
        "boxes": [[50, 50, 150, 100], [0, 0, 20, 26]],
    }
    assert made["normalized_boxes"] == [[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.1, 0.255]]
    assert 0 < made["timing"]["first_token_seconds"] <= made["timing"]["total_seconds"]


def test_json_of_several_prompts_is_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, image: Path
) -> None:
    """Images go to the marks in order; boxes are pixels of the prompt's own picture."""
    other = image.parent / picture(image.parent, "b.png", 40, 80)
    script(monkeypatch, "[0.5, 0.5, 1.0, 1.0]", "No picture.", "[0.5, 0.5, 1.0, 1.0]")
    arguments = [
        "--prompt",
        "<image> A?",
        "--prompt",
        "B?",
        "--prompt",
        "C <image>?",
        "--image",
        image,
        "--image",
        other,
    ]
    assert ask(checkpoint, *arguments, "--json") == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [m["boxes"] for m in made] == [[[100, 50, 200, 100]], [], [[20, 40, 40, 80]]]
    assert [m["image_tokens"] for m in made] == [8, 0, 8]
    assert [m["text"] for m in made] == ["[0.5, 0.5, 1.0, 1.0]", "No picture.", "[0.5, 0.5, 1.0, 1.0]"]


def test_several_prompts_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    script(monkeypatch, "One.", "Two, longer.")
    assert ask(checkpoint, "--prompt", "A?", "--prompt", "B?") == 0
    assert capsys.readouterr().out == "One.\nTwo, longer.\n"


def test_a_prompt_without_marks_gets_its_images_in_front(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, image: Path
) -> None:
    options = ["--image", image, "--image", image, "--json", "--max-new-tokens", 4]
    assert ask(checkpoint, "--prompt", "What?", *options) == 0
    assert ask(checkpoint, "--prompt", "<image>\n<image>\nWhat?", *options) == 0
    bare, marked = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert bare["image_tokens"] == 16
    assert (bare["token_ids"], bare["prompt_tokens"]) == (marked["token_ids"], marked["prompt_tokens"])
    assert bare["finish_reason"] == "length"


def test_modes_and_sampling_reach_the_engine(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    def tokens(*options: object) -> list[int]:
        assert ask(checkpoint, "--prompt", "Why?", "--json", "--max-new-tokens", 8, *options) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    assert len({tuple(tokens("--mode", mode)) for mode in ("auto", "think", "nothink")}) == 3
    warm = ("--temperature", 2, "--seed", 4)
    assert tokens(*warm) == tokens(*warm)
    assert tokens(*warm) != tokens("--temperature", 2, "--seed", 5)
    assert tokens(*warm, "--top-k", 1) == tokens() == tokens(*warm, "--top-p", 1e-9)


def test_draw_changes_the_pixels_of_the_box(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, image: Path
) -> None:
    script(monkeypatch, "[0.25, 0.5, 0.75, 0.9]")
    path = image.parent / "drawn.png"
    assert ask(checkpoint, "--prompt", "Where?", "--image", image, "--draw", path) == 0
    before, after = Image.open(image).convert("RGB"), Image.open(path)
    assert after.size == before.size
    assert ImageChops.difference(before, after).getbbox() == (50, 50, 150, 90)
    assert after.getpixel((100, 70)) == before.getpixel((100, 70)), "an outline, not a filled box"
    assert capsys.readouterr().err == ""


def test_draw_without_a_box_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, image: Path
) -> None:
    script(monkeypatch, "I cannot see it.")
    assert ask(checkpoint, "--prompt", "Where?", "--image", image, "--draw", image.parent / "drawn.png") == 0
    assert "names no box" in capsys.readouterr().err
    difference = ImageChops.difference(Image.open(image.parent / "drawn.png"), Image.open(image).convert("RGB"))
    assert difference.getbbox() is None


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def copy(checkpoint: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(checkpoint, folder / "broken")
    change(folder / "broken")
    return folder / "broken"


SHARD = "model-00001-of-00001.safetensors"
WRONG: dict[str, Callable[[Path, Path], tuple[list[object], str]]] = {
    "no such image": lambda d, c: (["--image", d / "gone.png"], "gone.png: "),
    "empty image": lambda d, c: (["--image", cut(d / "a.png", 0)], "a.png: the image file is empty"),
    "truncated image": lambda d, c: (["--image", cut(d / "a.png", 0.6)], "a.png: cannot be read as an image"),
    "not an image": lambda d, c: (["--image", ROOT / "Makefile"], "Makefile: not a picture"),
    "a folder": lambda d, c: (["--image", d], "cannot be read"),
    "too few images": lambda d, c: (["--prompt", "<image> <image>"], "--image: 0 given for 2 <image> mark"),
    "too many images": lambda d, c: (
        ["--prompt", "<image>?", *["--image", d / "a.png"] * 2],
        "--image: 2 given for 1 <image> mark",
    ),
    "images without a prompt to go to": lambda d, c: (
        ["--prompt", "A", "--prompt", "B", "--image", d / "a.png"],
        "--image: 1 given for 0 <image> mark",
    ),
    "mode": lambda d, c: (["--mode", "dream"], "--mode: 'dream' is unknown, must be one of auto"),
    "no tokens": lambda d, c: (["--max-new-tokens", "0"], "--max-new-tokens: 0 must be 1 to 10^9"),
    "negative tokens": lambda d, c: (["--max-new-tokens=-5"], "--max-new-tokens: -5 must be"),
    "tokens that are no number": lambda d, c: (
        ["--max-new-tokens", "many"],
        "--max-new-tokens: 'many' is no integer, must be 1 to",
    ),
    "temperature": lambda d, c: (["--temperature=-1"], "--temperature: -1.0 must be 0 to 1e+30"),
    "temperature nan": lambda d, c: (["--temperature", "nan"], "--temperature: nan must be"),
    "top-p": lambda d, c: (["--top-p", "0"], "--top-p: 0.0 must be"),
    "top-k": lambda d, c: (["--top-k=-1"], "--top-k: -1 must be"),
    "seed": lambda d, c: (["--seed=-1"], "--seed: -1 must be"),
    "device": lambda d, c: (["--device", "abacus"], "--device: abacus cannot be used"),
    "option": lambda d, c: (["--colour", "red"], "unrecognized arguments: --colour red"),
    "window": lambda d, c: (["--prompt", "word " * 300], "the model's window holds 256"),
    "draw without an image": lambda d, c: (["--draw", d / "x.png"], "--draw: there is no picture"),
    "draw into no folder": lambda d, c: (
        ["--image", d / "a.png", "--max-new-tokens", "2", "--draw", d / "no" / "x.png"],
        "x.png: cannot be written",
    ),
    "draw over a folder": lambda d, c: (
        ["--image", d / "a.png", "--max-new-tokens", "2", "--draw", d],
        "cannot be written",
    ),
    "no checkpoint": lambda d, c: (["--checkpoint", d / "gone"], "gone: not a folder"),
    "empty checkpoint": lambda d, c: (["--checkpoint", d], "config.json: missing"),
    "truncated weights": lambda d, c: (
        ["--checkpoint", copy(c, d, lambda b: cut(b / SHARD, 0.5))],
        f"{SHARD}: not a whole safetensors file",
    ),
    "missing weights": lambda d, c: (
        ["--checkpoint", copy(c, d, lambda b: (b / SHARD).unlink())],
        f"{SHARD}: missing",
    ),
    "broken config": lambda d, c: (
        ["--checkpoint", copy(c, d, lambda b: cut(b / "config.json", 0.5))],
        "config.json:",
    ),
    "missing tokenizer": lambda d, c: (
        ["--checkpoint", copy(c, d, lambda b: (b / "tokenizer.json").unlink())],
        "tokenizer.json: missing",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, image: Path, kind: str
) -> None:
    arguments, words = WRONG[kind](image.parent, checkpoint)
    prompt = [] if "--prompt" in arguments else ["--prompt", "Where?"]
    assert ask(checkpoint, *prompt, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1 == len(err.splitlines())
    assert words in err


def test_the_program_itself(checkpoint: Path, image: Path, tmp_path: Path) -> None:
    """As it is called: its exit status, its two streams, and --help."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "infer.main", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    asked = [
        "--checkpoint",
        checkpoint,
        "--prompt",
        "<image>?",
        "--device",
        "cpu",
        "--max-new-tokens",
        3,
        "--json",
    ]
    good = call(*asked, "--image", image)
    assert (good.returncode, good.stderr) == (0, "")
    made = json.loads(good.stdout)
    model, processor = phi4rv.load(checkpoint, device="cpu")
    assert made["token_ids"][0] == int(model(processor([Prompt("<image>?", [image])]))[-1].argmax())
    bad = call(*asked, "--image", "gone.png")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: gone.png: ")
    assert len(bad.stderr.splitlines()) == 1
    assert "--checkpoint" in call("--help").stdout
