"""Text while tokens come is the text of all tokens together, whatever they are and however they come."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infer.requests.detokenizer import Detokenizer, TextDelta
from phi4rv.errors import UserError
from phi4rv.processing.answers import parse_answer
from phi4rv.processing.processor import Processor
from tests.small import small_config, small_model

PROCESSOR = small_model()[1]
MODES = ("auto", "think", "nothink")
# What matters to a stream: tags whole, broken and misspelled, end tokens, white space, bytes of emoji, broken bytes.
PIECES = [
    *("<think>", "</think>", "<|dummy_84|>", "<nothink>", "<notthink>", "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
    *("<", "</", "<th", "ink", ">", "<no", "<not", "think>", "<|", "<|im_", "im_end", "|>", "<|im_end", "<|end"),
    *(" ", "\n", "\n\n", " \t", "\u3000", "\x1c", "\x85", "é", "😀", "👩\u200d👩\u200d👧", "\ufffd"),
    *("a", "b", "ab", "abc", "stop", "st", "op"),
]


def ids_of(text: str) -> list[int]:
    return PROCESSOR.tokenizer.encode(text, add_special_tokens=False).ids


def byte_ids(data: bytes) -> list[int]:
    """The tokens of single bytes, be they text or not."""
    alphabet = {PROCESSOR.tokenizer.decode([i]): i for i in range(256)}
    known = {text.encode(): i for text, i in alphabet.items() if len(text.encode()) == 1}
    rest = sorted(set(range(256)) - set(known.values()))
    assert len(rest) == 128
    # The vocabulary lists the bytes by the characters that stand for them, those of printed bytes first.
    order = [*range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x80, 0xA1), 0xAD]
    table = known | {bytes([b]): i for b, i in zip(order, rest, strict=True)}
    return [table[bytes([b])] for b in data]


TOKENS = st.lists(
    st.one_of(
        st.sampled_from(PIECES).map(ids_of),
        st.sampled_from(PIECES).map(lambda text: byte_ids(text.encode())),
        st.integers(0, 1023).map(lambda token: [token]),
        st.binary(max_size=4).map(byte_ids),
    ),
    max_size=25,
).map(lambda lists: [token for tokens in lists for token in tokens])


def stream(ids: Sequence[int], mode: str, stop: tuple[str, ...] = (), cuts: Sequence[int] = ()) -> list[TextDelta]:
    """One push for the tokens between two cuts; at every place, if none are given."""
    places = sorted({0, *(cuts or range(len(ids))), len(ids)})
    text = Detokenizer(PROCESSOR, mode, stop)
    deltas = []
    for begin, end in pairwise(places):
        deltas.append(text.push(ids[begin:end]))
        assert text.thinking == ("".join(d.thinking for d in deltas) if text.thinking is not None else None)
        assert text.text == "".join(d.text for d in deltas)
    deltas.append(text.finish())
    thinking, answer = ("".join(getattr(d, part) for d in deltas) for part in ("thinking", "text"))
    assert (text.thinking or "", text.text) == (thinking, answer)
    whole = parse_answer(PROCESSOR.decode(ids), mode)
    assert text.thinking == whole.thinking
    assert text.finish() == TextDelta(stopped=deltas[-1].stopped), "the second finish has nothing to add"
    return deltas


@settings(max_examples=400, deadline=None, derandomize=True)
@given(TOKENS, st.sampled_from(MODES), st.lists(st.integers(0, 60), max_size=8))
@example(byte_ids("😀".encode()[:3]), "auto", [])
@example(byte_ids("<think>😀</think>".encode()[:-1]), "auto", [])
@example(ids_of("<think>a<|im_end|> </think> <|dummy_84|> <|im_end|> b <|im_end|>"), "auto", [])
@example([], "think", [])
def test_deltas_are_the_answer(ids: list[int], mode: str, cuts: list[int]) -> None:
    cuts = [cut for cut in cuts if cut < len(ids)]
    deltas = stream(ids, mode, cuts=cuts)
    whole = parse_answer(PROCESSOR.decode(ids), mode)
    assert "".join(d.thinking for d in deltas) == (whole.thinking or "")
    assert "".join(d.text for d in deltas) == whole.text
    assert not any(d.stopped for d in deltas)


def stopped_answer(ids: Sequence[int], mode: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The answer up to the first stop string to be complete, found letter by letter in the whole text."""
    mark = "■"  # keeps what is behind the answer from being dropped
    whole = parse_answer(PROCESSOR.decode(ids) + mark, mode).text.removesuffix(mark)
    for end in range(1, len(whole) + 1):
        if hits := [s for s in stop if whole[:end].endswith(s)]:
            return re.sub(r"(\s|<\|im_end\|>|<\|endoftext\|>)*$", "", whole[: end - max(map(len, hits))]), True
    return parse_answer(PROCESSOR.decode(ids), mode).text, False


STOPS = st.lists(
    st.one_of(st.sampled_from([p for p in PIECES if p]), st.sampled_from(["stop", "abca", "bc", "\n\n", "d|>b"])),
    min_size=1,
    max_size=3,
).map(tuple)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(TOKENS, st.sampled_from(MODES), STOPS, st.lists(st.integers(0, 60), max_size=8))
@example(ids_of("xabcab"), "nothink", ("abca", "bc"), [0])
@example(ids_of("a<|im_end|>"), "nothink", ("d|>b",), [])
def test_the_answer_ends_at_the_first_stop_string(
    ids: list[int], mode: str, stop: tuple[str, ...], cuts: list[int]
) -> None:
    cuts = [cut for cut in cuts if cut < len(ids)]
    deltas = stream(ids, mode, stop, cuts)
    text, stopped = stopped_answer(ids, mode, stop)
    assert "".join(d.text for d in deltas) == text
    assert deltas[-1].stopped == stopped
    first = [d.stopped for d in deltas].index(True) if stopped else len(deltas)
    assert all(d == TextDelta(stopped=True) for d in deltas[first + 1 :]), "nothing comes after a stop"


def test_text_comes_as_soon_as_it_is_certain() -> None:
    ids = [*ids_of("<think>"), *ids_of("why"), *ids_of("</think>"), *ids_of("it is"), *byte_ids("😀".encode())]
    deltas = stream(ids, "auto")
    assert "".join(d.thinking for d in deltas[:4]) == "why"
    assert [d.text for d in deltas[-5:]] == ["", "", "", "😀", ""]
    told = [d.text for d in stream(byte_ids(b"a < b <|i c st stop"), "nothink", ("stop",))]
    assert told == ["a", "", "", " <", " b", "", "", "", "", " <|i", " c", "", "", "", " st", "", "", "", "", ""]


def test_stop_strings_count_in_the_answer_only() -> None:
    deltas = stream(ids_of("a stop b</think>c stop d"), "think", ("stop",))
    assert "".join(d.thinking for d in deltas) == "a stop b"
    assert "".join(d.text for d in deltas) == "c" and deltas[-1].stopped


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    tokenizer = json.loads(PROCESSOR.files["tokenizer.json"])
    tokenizer["decoder"] = {"type": "Fuse"}
    files = PROCESSOR.files | {"tokenizer.json": json.dumps(tokenizer).encode()}
    with pytest.raises(UserError, match=r"^tokenizer.json: its decoder must be ByteLevel"):
        Detokenizer(Processor(files, small_config()), "auto")
    with pytest.raises(UserError, match="unknown mode"):
        Detokenizer(PROCESSOR, "slow")
