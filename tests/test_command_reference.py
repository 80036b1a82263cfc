"""Every command tells each of its options in one way, and refuses what is no value of it in one line."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from docs import make_reference
from infer.engine.config import EngineConfig
from infer.requests.sampling_params import SamplingParams
from phi4rv.command_line import MOST, Number, OneOf, Option, Parser, exit_status
from phi4rv.errors import UserError
from tests.small import ROOT

PARSERS = make_reference.parsers()
INFER = PARSERS["infer.main"]


def test_the_page_is_what_the_parsers_say() -> None:
    assert make_reference.PAGE.read_text(encoding="utf-8") == make_reference.page(), "run python -m docs.make_reference"


def test_every_command_is_on_the_page() -> None:
    """Each module of the repository that makes a parser."""
    folders = ("train", "infer", "phi4rv", "benchmarks")
    files = [file.relative_to(ROOT) for folder in folders for file in (ROOT / folder).rglob("*.py")]
    making = {".".join(f.with_suffix("").parts) for f in files if "\ndef make_parser(" in (ROOT / f).read_text()}
    assert {"train.main" if name == "train.options" else name for name in making} == set(PARSERS)


def test_no_command_declares_options_in_another_way() -> None:
    files = [f for folder in ("train", "infer", "phi4rv", "benchmarks") for f in (ROOT / folder).rglob("*.py")]
    bare = [f for f in files if re.search(r"ArgumentParser\(|\.add_argument\(", f.read_text())]
    assert [f.relative_to(ROOT) for f in bare] == [Path("phi4rv/command_line.py")]


@pytest.mark.parametrize("module", PARSERS)
def test_help_tells_every_option(module: str) -> None:
    """Its names, meaning, range or choices, and default; and nothing is declared beside."""
    parser, shown = PARSERS[module], squeezed(PARSERS[module].format_help())
    for option in parser.options:
        assert option.meaning in shown and option.allowed in shown, option.names
        assert all(name in shown for name in option.names)
        assert option.kind is None or option.default == "required" or f"default: {option.default}]" in shown
    told = {name for option in parser.options for name in option.names if name.startswith("-")}
    assert set(parser._option_string_actions) == told | {"-h", "--help", "--version"}


def squeezed(text: str) -> str:
    """As one line; argparse breaks words at hyphens too."""
    return re.sub(r"(?<=\w-) (?=\w)", "", " ".join(text.split()))


@pytest.mark.parametrize("module", PARSERS)
def test_version(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(r"phi4rv \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_the_same_name_means_the_same() -> None:
    """What stands before the first semicolon is the same in all commands that have the option."""
    meanings: dict[str, dict[str, list[str]]] = {}
    for module, option in options():
        meanings.setdefault(option.names[0], {}).setdefault(option.meaning.partition("; ")[0], []).append(module)
    assert {name: told for name, told in meanings.items() if len(told) > 1} == {}


def options() -> Iterator[tuple[str, Option]]:
    for module, parser in PARSERS.items():
        for option in parser.options:
            yield module, option


def edges(kind: Number) -> tuple[list[float], list[float]]:
    """Values just inside of the range and just outside of it."""
    step = 1 if kind.kind is int else (kind.low or 1e-30) / 10
    low = (kind.low, kind.low - step) if kind.low is not None else (kind.above + step, kind.above)  # type: ignore[operator]
    inside, outside = [low[0]], [low[1]]
    if kind.high is not None:
        inside.append(kind.high)
        outside.append(kind.high + 1 if kind.kind is int else kind.high * 1.001)
    if kind.below is not None:
        inside.append(kind.below - 1)
        outside.append(kind.below)
    return inside, outside


def wrong_values(option: Option) -> list[str]:
    """No number, NaN, and what lies just outside of the range; or no choice."""
    if isinstance(option.kind, OneOf):
        return ["", "no such word"]
    assert isinstance(option.kind, Number)
    more = ["inf", "1.5"] if option.kind.kind is int else []
    return ["", "many", "nan", "-inf", "1e", "1,5", *more, *map(str, edges(option.kind)[1])]


@pytest.mark.parametrize("module", PARSERS)
def test_a_wrong_value_is_one_line(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every option that takes numbers or words, in every command."""
    main = importlib.import_module(module).main
    for option in PARSERS[module].options:
        if not isinstance(option.kind, Number | OneOf):
            continue
        for value in wrong_values(option):
            name = option.names[0] if option.names[0].startswith("-") else option.metavar
            assert main([f"{name}={value}" if name.startswith("-") else value]) == 2, (name, value)
            captured = capsys.readouterr()
            assert captured.err.startswith(f"error: {'/'.join(option.names) if len(option.names) > 1 else name}: ")
            assert "must be" in captured.err and option.allowed in captured.err
            assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("module", PARSERS)
def test_an_unknown_option_and_a_missing_one_are_one_line(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, needed = importlib.import_module(module).main, []
    for option in PARSERS[module].options:
        if option.default == "required":
            value = "1" if isinstance(option.kind, Number) else "x"
            needed += [option.names[0], value] if option.names[0].startswith("-") else [value]
    assert main([*needed, "--no-such\noption"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --no-such\\noption\n"
    if needed:
        assert main([]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the following arguments are required: ") and error.count("\n") == 1


def test_what_the_command_line_allows_the_engine_allows() -> None:
    """Ranges stand in the parser, for --help, and in the classes, which callers without a command line use too."""
    checked = 0
    for option in INFER.options:
        if isinstance(option.kind, Number):
            field = option.names[0][2:].replace("-", "_")
            [owner] = [c for c in (SamplingParams, EngineConfig) if field in c.__dataclass_fields__]
            inside, outside = edges(option.kind)
            for value in inside:
                owner(**{field: value})
            for value in outside[: 1 if option.kind.high == MOST else None]:
                with pytest.raises(UserError, match=f"^{option.names[0]}: "):
                    owner(**{field: value})
                checked += 1
    assert checked > 15


def test_help_needs_no_optional_package() -> None:
    """Of all commands, in a process in which those packages cannot be imported."""
    code = (
        "import importlib, sys\n"
        "for name in ('triton', 'aiohttp', 'prometheus_client', 'llguidance', 'transformers', 'flash_attn', 'vllm'):\n"
        "    sys.modules[name] = None\n"
        f"for module in {list(PARSERS)!r}:\n"
        "    assert importlib.import_module(module).make_parser().format_help().startswith('usage: ')\n"
        "    print(module)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == list(PARSERS), done.stderr


def test_an_option_must_be_told() -> None:
    """Its meaning, and what holds without it, where it is declared."""
    for wrong in ({"help": ""}, {"help": " ", "default": 1}, {"help": "what it is"}, {"help": "x", "default": []}):
        with pytest.raises(AssertionError, match=r"^--it: "):
            Parser("x", "").add("--it", **wrong)
    Parser("x", "").add("--it", help="what it is", unset="nothing")
    Parser("x", "").add("--it", help="what it is", required=True)
    Parser("x", "").add("--it", help="what it is", action="store_true")


@pytest.mark.parametrize(
    ("kind", "shown", "right", "wrong"),
    [
        (Number(int, 1), "1 or more", ["1", "9" * 30], ["0", "1.0", "nan", "inf", "1e3", "", "1" * 5000]),
        (Number(float, above=0), "above 0", ["1e-300", "7"], ["0", "-0.0", "nan", "inf", "1e999", "0x1"]),
        (Number(float, above=0, infinite=True), "above 0", ["inf"], ["-inf", "nan"]),
        (Number(float, 0, below=1), "at least 0 and below 1", ["0", "0.999"], ["1", "-1e-9", "nan"]),
        (Number(float, above=0, high=1), "above 0 and at most 1", ["1"], ["0", "1.0001"]),
        (Number(int, 0, below=2**63), "at least 0 and below 2^63", ["9223372036854775807"], ["9223372036854775808"]),
        (Number(int, 1, 10**9), "1 to 10^9", ["1000000000"], ["1000000001"]),
        (OneOf((1, 2)), "one of 1, 2", ["1"], ["3", "1.0", "one"]),
        (OneOf(("a", "b")), "one of a, b", ["a"], ["A", "", "ab"]),
    ],
)
def test_ranges(kind: Number | OneOf, shown: str, right: list[str], wrong: list[str]) -> None:
    parser = Parser("x", "")
    parser.add("--it", help="what it is", kind=kind, unset="nothing")
    assert str(kind) == shown and f"[{shown}; default: nothing]" in squeezed(parser.format_help())
    for text in right:
        assert str(parser.parse_args([f"--it={text}"]).it) in (text, str(float(text)) if text[0] != "a" else text)
    for text in wrong:
        with pytest.raises(UserError, match=f"^--it: .*must be .*{re.escape(shown)}$"):
            parser.parse_args([f"--it={text}"])


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a CPU too; any other RuntimeError is a fault of the program's."""
    assert exit_status(lambda: print(torch.empty(2**62, dtype=torch.uint8))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device: can't allocate memory: ") and error.count("\n") == 1
    with pytest.raises(RuntimeError):
        exit_status(lambda: print(torch.ones(2) @ torch.ones(3)))


def test_a_script_is_called_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/phi4rv-train"])
    assert Parser("train.main", "").format_help().startswith("usage: phi4rv-train [OPTION …]\n")
