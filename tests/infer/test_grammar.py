"""Whatever is drawn from the allowed tokens is right, and whatever is right can be drawn."""

import json
import random
import re
import sys
from typing import Any

import jsonschema
import pytest

from infer.requests.detokenizer import Detokenizer
from infer.requests.grammar import Grammar
from infer.requests.sampling_params import SamplingParams
from phi4rv.errors import UserError
from tests.small import small_model

PROCESSOR = small_model()[1]
ENDS = {1008, 1011}
ADDED = set(range(1008, 1024))  # the last eight are in the model's vocabulary alone

BOX = {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 4, "maxItems": 4}
SCHEMAS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    # schema, answers that fit, answers that do not
    "object": (
        {
            "type": "object",
            "properties": {"label": {"enum": ["Save", "Größe 😀"]}, "box": BOX, "count": {"type": "integer"}},
            "required": ["label", "box"],
            "additionalProperties": False,
        },
        ['{"label": "Größe 😀", "box": [0.25, 0, 1, 1.0]}', '{"label":"Save","box":[0,0,1,1],\n  "count": -7}'],
        ['{"label": "Open", "box": [0, 0, 1, 1]}', '{"label": "Save"}', '{"label": "Save", "box": [0, 0, 1]}', "[]"],
    ),
    "string": (
        {"type": "string", "minLength": 2, "maxLength": 4},
        ['"é😀"', '"abcd"', r'"\"\n"'],
        ['"a"', '"abcde"', '"é"'],
    ),
    "choice": (
        {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"const": {"a": [1]}}, {"type": "integer", "minimum": 5}]},
        ["null", "true", '{"a":[1]}', "5", "120"],
        ["nul", "4", '{"a":[2]}', "5.5"],
    ),
    "tree": (
        {
            "$defs": {
                "node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "v": {"type": "string"}}}
            },
            "$ref": "#/$defs/node",
        },
        ["{}", '{"next": {"next": {"v": "x\\"y"}}}', '{"other": [1, {"a": null}]}'],
        ['{"next": 1}', '{"v": "x}'],
    ),
    "pattern": (
        {"type": "string", "pattern": r"^[A-ZÄ]{2}-\d{3}$"},
        ['"AÄ-123"'],
        ['"AA-12"', '"aA-123"', '"AA-1234"'],
    ),
    "anything": ({}, ['[1e5, "x", {"y": [true]}]', '"😀"', "-0.5"], ["[1,]", "{'a': 1}", "01"]),
}
REGEXES = {
    r"(yes|no), \d{1,3} ?%": (["yes, 12%", "no, 100 %"], ["maybe", "yes, %", "yes,12%"]),
    r"[α-ω😀-😎]{3,6}": (["αβγ", "😀😎ω😀"], ["α", "😀😎", "abc"]),
    r"[^\x00-\x7f]+!": (["é!", "日本😀!"], ["a!", "!"]),
    r"\[0\.\d\d(, 0\.\d\d){3}\]": (["[0.10, 0.25, 0.50, 0.99]"], ["[0.10, 0.25, 0.50]", "[1.10, 0.25, 0.50, 0.99]"]),
    r".{0,9}end": (["end", "😀 the end"], ["0123456789end", "a\nend"]),
    r"<think>x?|<\|im_end\|>y": (["<think>", "<|im_end|>y"], ["<think>y", "x"]),
}


def grammar(what: str) -> Grammar:
    params = SamplingParams(json_schema=SCHEMAS[what][0]) if what in SCHEMAS else SamplingParams(regex=what)
    return Grammar(PROCESSOR, params, ENDS)


def fits(what: str, text: str) -> bool:
    if what in REGEXES:
        return re.fullmatch(what, text) is not None
    try:
        jsonschema.validate(json.loads(text), SCHEMAS[what][0])
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def spelled(text: str) -> list[int]:
    """Tokens of plain text; a tag in it is spelled by its letters."""
    pieces = re.split(r"(?<=<)", text)
    return [i for piece in pieces for i in PROCESSOR.tokenizer.encode(piece, add_special_tokens=False).ids]


@pytest.mark.parametrize("what", [*SCHEMAS, *REGEXES])
def test_random_walks_end_in_what_fits(what: str) -> None:
    choose = random.Random(what)
    # A string of random tokens hardly ever ends by itself.
    closing = {i for text in '"}],: 0123456789!%end' for i in spelled(text)} | ENDS
    texts = set()
    for _ in range(15):
        state, ids = grammar(what), []
        while True:
            allowed = state.allowed_tokens()
            assert allowed.shape == (1024,)
            tokens = set(allowed.nonzero().flatten().tolist())
            assert tokens and not tokens & (ADDED - ENDS)
            assert (tokens & ENDS) in (set(), ENDS) and (not state.is_terminated or tokens == ENDS)
            short = sorted(tokens & closing)
            token = choose.choice(short if short and choose.random() < len(ids) / 40 else sorted(tokens))
            state.accept_token(token)
            if token in ENDS:
                break
            ids.append(token)
            assert len(ids) < 2000
        assert state.is_terminated
        texts.add(PROCESSOR.decode(ids))
        assert fits(what, PROCESSOR.decode(ids)), PROCESSOR.decode(ids)
    assert len(texts) > 1


@pytest.mark.parametrize("what", [*SCHEMAS, *REGEXES])
def test_what_fits_can_be_written_and_nothing_else(what: str) -> None:
    right, wrong = SCHEMAS[what][1:] if what in SCHEMAS else REGEXES[what]
    for text in (*right, *wrong):
        state, good = grammar(what), True
        for token in spelled(text):
            if not (good := bool(state.allowed_tokens()[token])):
                break
            state.accept_token(token)
        good = good and bool(state.allowed_tokens()[sorted(ENDS)].all())
        assert good == (text in right) == fits(what, text), text


def test_the_mask_of_a_finite_language_is_exact() -> None:
    """Brute force: a token is allowed if some word goes on with its bytes."""
    words = ["yes", "yesterday", "né😀", "n😎", "", "the error"]
    stream = Detokenizer(PROCESSOR, "nothink")
    alphabet = {i: stream._bytes(i) for i in range(1008)}
    choose = random.Random(0)
    for _ in range(10):
        state, written = Grammar(PROCESSOR, SamplingParams(regex="|".join(words)), ENDS), b""
        while True:
            rest = [w.encode()[len(written) :] for w in words if w.encode().startswith(written)]
            allowed = state.allowed_tokens()
            wanted = [i for i, b in alphabet.items() if any(r.startswith(b) for r in rest)]
            found = [i for i in alphabet if allowed[i]]
            if len({r[:1] for r in rest}) == 1 and wanted:  # what must follow is written in the tokenizer's own tokens
                assert found and set(found) <= set(wanted)
            else:
                assert found == wanted
            assert bool(allowed[1008]) == bool(allowed[1011]) == (b"" in rest)
            if not wanted:
                break
            token = choose.choice(found)
            written += alphabet[token]
            state.accept_token(token)


def test_the_end_is_known_at_the_last_token() -> None:
    state = grammar("object")
    for token in spelled('{"label": "Save", "box": [0, 0, 1, 1]}'):
        assert not state.is_terminated
        state.accept_token(token)
    assert state.is_terminated
    state = grammar("choice")
    for token in spelled("12"):
        state.accept_token(token)
    assert not state.is_terminated, "more digits can follow"


def test_a_copy_goes_its_own_way() -> None:
    state = grammar(r"(yes|no), \d{1,3} ?%")
    twin = state.copy()
    state.accept_token(spelled("y")[0])
    assert twin.allowed_tokens()[spelled("n")[0]] and not state.allowed_tokens()[spelled("n")[0]]
    twin.accept_token(spelled("n")[0])
    assert state.allowed_tokens()[spelled("es")[0]] and not twin.allowed_tokens()[spelled("es")[0]]


def test_white_space_has_an_end() -> None:
    state = grammar("anything")
    state.accept_token(spelled("[")[0])
    newline = spelled("\n")[0]
    for _ in range(40):
        assert state.allowed_tokens()[newline]
        state.accept_token(newline)
    assert not state.allowed_tokens()[newline]


def nested(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": nested(depth - 1) if depth else {}}}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(regex="[a"), "--regex: unclosed character class"),
        (SamplingParams(regex="(?=a)b"), "--regex: look-around, including"),
        (SamplingParams(json_schema={"type": "car"}), "--json-schema: Invalid type: car"),
        (SamplingParams(json_schema='{"not": {}}'), '--json-schema: Unimplemented keys: ["not"]'),
        (SamplingParams(json_schema='{"$ref": "#/x"}'), "--json-schema: Pointer '/x' does not exist"),
        (SamplingParams(json_schema={"enum": []}), "--json-schema: Unsatisfiable schema"),
        (SamplingParams(json_schema="3"), "--json-schema: 3 must be an object"),
        (SamplingParams(json_schema={"const": float("nan")}), "--json-schema: not JSON (Out of range float"),
        (SamplingParams(json_schema=nested(150)), "--json-schema: recursion limit exceeded"),
        (SamplingParams(json_schema={"const": {1}}), "--json-schema: not JSON (Object of type set"),
    ],
)
def test_what_cannot_be_followed_is_refused(params: SamplingParams, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as caught:
        Grammar(PROCESSOR, params, ENDS)
    assert "\n" not in str(caught.value)


def test_what_would_take_seconds_a_token_is_refused() -> None:
    state = Grammar(PROCESSOR, SamplingParams(regex="(a{1000}){1000}"), ENDS)
    with pytest.raises(UserError, match="--regex: lexer error: too many expressions"):
        state.accept_token(int(state.allowed_tokens().nonzero()[0]))


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    state = grammar("choice")
    with pytest.raises(UserError, match=r"--json-schema: .*doesn't satisfy the grammar"):
        state.accept_token(spelled("x")[0])


@pytest.mark.parametrize("params", [SamplingParams(regex="a"), SamplingParams(json_schema={})])
def test_without_llguidance_its_install_is_named(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    option = "--regex" if params.regex else "--json-schema"
    with pytest.raises(UserError, match=rf"^{option} needs llguidance: pip install llguidance$"):
        Grammar(PROCESSOR, params, ENDS)
