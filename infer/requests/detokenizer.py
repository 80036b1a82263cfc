"""Tokens to text while they come: the thought and the answer apart, nothing told that later tokens could take back."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import decoders

from phi4rv.errors import UserError
from phi4rv.processing.answers import END_TOKENS, NOTHINK_SPELLINGS, THINK_END, strip_end_tokens, strip_nothink
from phi4rv.processing.chat_template import THINK, check_mode
from phi4rv.processing.processor import TOKENIZER, Processor

# Byte-level BPE writes the bytes that print as themselves, the others as the characters from 256 on (Radford 2019).
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(b): b for b in _PRINTED}
_BYTES |= {chr(0x100 + n): b for n, b in enumerate(b for b in range(0x100) if b not in _PRINTED)}


@dataclass(frozen=True)
class Delta:
    """New text of the thought and of the answer. stopped: a stop string came, and no more text will."""

    thinking: str = ""
    text: str = ""
    stopped: bool = False


class TextStream:
    """``push(ids)`` for tokens as they are made, ``finish()`` behind the last: what they add to thought and answer.

    All deltas together are ``parse_answer(processor.decode(ids), mode)``, but that the answer ends where the first
    ``stop`` string to be complete begins; white space in front of that is dropped too. A token costs the same however
    long the answer is. UserError for a tokenizer whose decoder is not byte-level.
    """

    def __init__(self, processor: Processor, mode: str, stop: Sequence[str] = ()):
        check_mode(mode)
        if not isinstance(processor.tokenizer.decoder, decoders.ByteLevel):
            raise UserError(f"{TOKENIZER}: its decoder must be ByteLevel, to turn tokens into text one by one")
        self._tokenizer, self._stop = processor.tokenizer, tuple(stop)
        # Waits until a character is whole, and writes broken ones as the tokenizer's own decoder does.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._thought = _Trimmed() if mode == "think" else None
        self._answer = _Trimmed()
        self._stage = "opening"  # then "thought", if there is one, "start" (of the answer), "answer" and "stopped"
        self._held = ""

    @property
    def thinking(self) -> str | None:
        """The thought so far; None where there is none, or none yet."""
        return None if self._thought is None else "".join(self._thought.told)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._answer.told)

    def push(self, token_ids: Sequence[int]) -> Delta:
        return self._read(self._decoder.decode(b"".join(map(self._bytes, token_ids))), last=False)

    def finish(self) -> Delta:
        """What was held back."""
        return self._read(self._decoder.decode(b"", final=True), last=True)

    def _bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) or ""
        try:
            return bytes(map(_BYTES.__getitem__, token))
        except KeyError:  # an added token, with characters that stand for no byte
            return token.encode()

    def _read(self, new: str, last: bool) -> Delta:
        if self._stage == "stopped":
            return Delta(stopped=True)
        self._held += new
        if self._stage == "opening":
            self._open(last)
        thinking = self._read_thought(last) if self._stage == "thought" else ""
        if self._stage == "start":
            self._held = strip_nothink(self._held)
            if last or not _may_become(self._held, NOTHINK_SPELLINGS):
                self._stage = "answer"
        text = self._read_answer(last) if self._stage == "answer" else ""
        return Delta(thinking, text, self._stage == "stopped")

    def _open(self, last: bool) -> None:
        self._held = self._held.lstrip()
        if not last and _may_become(self._held, (THINK,)):
            return
        if self._held.startswith(THINK):
            self._held = self._held.removeprefix(THINK)
            self._thought = self._thought or _Trimmed()
        self._stage = "start" if self._thought is None else "thought"

    def _read_thought(self, last: bool) -> str:
        assert self._thought is not None
        before, tag, after = self._held.partition(THINK_END)
        if tag:
            self._held, self._stage = after, "start"
            return self._thought.push(before) + self._thought.finish(str.rstrip)
        told = self._thought.push(self._take(last, (THINK_END,)))
        return told + self._thought.finish(strip_end_tokens) if last else told

    def _read_answer(self, last: bool) -> str:
        # The first to be complete, so that it is the same one whatever tokens the text comes in.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._held, self._stage, last = self._held[: min(found)[1]], "stopped", True
        told = self._answer.push(self._take(last, self._stop))
        return told + self._answer.finish(strip_end_tokens) if last else told

    def _take(self, last: bool, patterns: Sequence[str]) -> str:
        """What is held, up to where one of ``patterns`` may begin; all of it if nothing follows."""
        cut = len(self._held) if last else _beginning(self._held, patterns)
        taken, self._held = self._held[:cut], self._held[cut:]
        return taken


class _Trimmed:
    """Text without white space around it and end tokens behind it; ``told`` as soon as it is certain."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._behind: list[str] = []  # white space and end tokens, dropped if nothing else follows
        self._held = ""  # may become an end token

    def push(self, new: str) -> str:
        text = self._held + new
        if not self.told and not self._behind:
            text = text.lstrip()
        cut = _beginning(text, END_TOKENS)
        whole, self._held = text[:cut], text[cut:]
        kept = strip_end_tokens(whole)
        told = self._tell("".join([*self._behind, kept])) if kept else ""
        if rest := whole[len(kept) :]:
            self._behind.append(rest)
        return told

    def finish(self, strip: Callable[[str], str]) -> str:
        """The rest. ``strip`` takes away what is not part of the text; end tokens within an answer are."""
        rest, self._held = strip("".join([*self._behind, self._held])), ""
        return self._tell(rest)

    def _tell(self, text: str) -> str:
        self.told.append(text)
        self._behind = []
        return text


def _may_become(text: str, patterns: Sequence[str]) -> bool:
    return any(pattern.startswith(text) and pattern != text for pattern in patterns)


def _beginning(text: str, patterns: Sequence[str]) -> int:
    """Where the longest end of ``text`` begins that is a beginning of one of ``patterns``, and not all of it."""
    start = len(text)
    for pattern in patterns:
        at = text.find(pattern[0], max(0, len(text) - len(pattern) + 1), start)
        while at >= 0 and not pattern.startswith(text[at:]):
            at = text.find(pattern[0], at + 1, start)
        start = at if at >= 0 else start
    return start
