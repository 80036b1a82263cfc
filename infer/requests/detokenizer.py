"""Incremental detokenization: thought and answer apart, and no text emitted that later tokens could take back."""

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
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(b): b for b in _PRINTABLE}
_BYTES |= {chr(0x100 + n): b for n, b in enumerate(b for b in range(0x100) if b not in _PRINTABLE)}


@dataclass(frozen=True)
class TextDelta:
    """New text of the thought and of the answer. stopped: a stop string was found; no more text follows."""

    thinking: str = ""
    text: str = ""
    stopped: bool = False


class Detokenizer:
    """``push(token_ids)`` for new tokens, ``finish()`` after the last: the text they add to thought and answer.

    All deltas together are ``parse_answer(processor.decode(ids), mode)``, but the answer ends where the first ``stop``
    string to be complete begins; white space in front of that is dropped too. The cost of a token does not depend on
    the length of the answer. UserError for a tokenizer whose decoder is not byte-level.
    """

    def __init__(self, processor: Processor, mode: str, stop: Sequence[str] = ()):
        check_mode(mode)
        if not isinstance(processor.tokenizer.decoder, decoders.ByteLevel):
            raise UserError(f"{TOKENIZER}: its decoder must be ByteLevel, to turn tokens into text one by one")
        self._tokenizer, self._stop = processor.tokenizer, tuple(stop)
        # Holds bytes back until a character is whole, and replaces broken ones as the tokenizer's own decoder does.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._thought = _TrimmedText() if mode == "think" else None
        self._answer = _TrimmedText()
        # "opening", then "thought" if there is one, "start" (of the answer), "answer" and, at a stop string, "stopped".
        self._stage = "opening"
        self._buffer = ""

    @property
    def thinking(self) -> str | None:
        """The thought so far; None where there is none, or none yet."""
        return None if self._thought is None else "".join(self._thought.emitted)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._answer.emitted)

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        return self._read(self._decoder.decode(b"".join(map(self._bytes, token_ids))), last=False)

    def finish(self) -> TextDelta:
        """The text that was held back."""
        return self._read(self._decoder.decode(b"", final=True), last=True)

    def _bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) or ""
        try:
            return bytes(map(_BYTES.__getitem__, token))
        except KeyError:  # an added token, with characters that stand for no byte
            return token.encode()

    def _read(self, new: str, last: bool) -> TextDelta:
        if self._stage == "stopped":
            return TextDelta(stopped=True)
        self._buffer += new
        if self._stage == "opening":
            self._open(last)
        thinking = self._read_thought(last) if self._stage == "thought" else ""
        if self._stage == "start":
            self._buffer = strip_nothink(self._buffer)
            if last or not _is_prefix(self._buffer, NOTHINK_SPELLINGS):
                self._stage = "answer"
        text = self._read_answer(last) if self._stage == "answer" else ""
        return TextDelta(thinking, text, self._stage == "stopped")

    def _open(self, last: bool) -> None:
        self._buffer = self._buffer.lstrip()
        if not last and _is_prefix(self._buffer, (THINK,)):
            return
        if self._buffer.startswith(THINK):
            self._buffer = self._buffer.removeprefix(THINK)
            self._thought = self._thought or _TrimmedText()
        self._stage = "start" if self._thought is None else "thought"

    def _read_thought(self, last: bool) -> str:
        assert self._thought is not None
        before, tag, after = self._buffer.partition(THINK_END)
        if tag:
            self._buffer, self._stage = after, "start"
            return self._thought.push(before) + self._thought.finish(str.rstrip)
        text = self._thought.push(self._take_certain(last, (THINK_END,)))
        return text + self._thought.finish(strip_end_tokens) if last else text

    def _read_answer(self, last: bool) -> str:
        # The first to be complete, so that the result does not depend on how the text is cut into tokens.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._buffer.find(stop)) >= 0]
        if found:
            self._buffer, self._stage, last = self._buffer[: min(found)[1]], "stopped", True
        text = self._answer.push(self._take_certain(last, self._stop))
        return text + self._answer.finish(strip_end_tokens) if last else text

    def _take_certain(self, last: bool, patterns: Sequence[str]) -> str:
        """The buffer up to where one of ``patterns`` may begin; all of it after the last token."""
        cut = len(self._buffer) if last else _partial_match_start(self._buffer, patterns)
        taken, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return taken


class _TrimmedText:
    """Text without white space around it and end tokens behind it; emitted as soon as it is certain."""

    def __init__(self) -> None:
        self.emitted: list[str] = []
        self._trailing: list[str] = []  # white space and end tokens, dropped if nothing else follows
        self._buffer = ""  # may become an end token

    def push(self, new: str) -> str:
        text = self._buffer + new
        if not self.emitted and not self._trailing:
            text = text.lstrip()
        cut = _partial_match_start(text, END_TOKENS)
        whole, self._buffer = text[:cut], text[cut:]
        kept = strip_end_tokens(whole)
        emitted = self._emit("".join([*self._trailing, kept])) if kept else ""
        if rest := whole[len(kept) :]:
            self._trailing.append(rest)
        return emitted

    def finish(self, strip: Callable[[str], str]) -> str:
        """The rest. ``strip`` removes what is not part of the text; end tokens within an answer are."""
        rest, self._buffer = strip("".join([*self._trailing, self._buffer])), ""
        return self._emit(rest)

    def _emit(self, text: str) -> str:
        self.emitted.append(text)
        self._trailing = []
        return text


def _is_prefix(text: str, patterns: Sequence[str]) -> bool:
    """Whether ``text`` is a proper prefix of one of ``patterns``."""
    return any(pattern.startswith(text) and pattern != text for pattern in patterns)


def _partial_match_start(text: str, patterns: Sequence[str]) -> int:
    """Where the longest suffix of ``text`` begins that is a proper prefix of one of ``patterns``; else its length."""
    start = len(text)
    for pattern in patterns:
        at = text.find(pattern[0], max(0, len(text) - len(pattern) + 1), start)
        while at >= 0 and not pattern.startswith(text[at:]):
            at = text.find(pattern[0], at + 1, start)
        start = at if at >= 0 else start
    return start
