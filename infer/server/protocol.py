"""OpenAI's chat request, read: JSON -> messages, pictures and Options. Whatever would change the answer and is not
served is an error that names the field."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from infer.requests.request import LARGEST_SEED, Options, Sampling
from infer.server.errors import ApiError, of_user_error
from infer.server.json_fields import Fields, check_depth, check_text
from phi4rv.errors import UserError
from phi4rv.processing.answers import THINK_END
from phi4rv.processing.chat_template import IMAGE_TOKEN, THINK, Message
from phi4rv.processing.processor import Processor

MOST_CHOICES = 8
MOST_MESSAGES = 512
MOST_PICTURES = 16
MOST_STOPS, LONGEST_STOP = 16, 256
LONGEST_CONSTRAINT = 64 * 1024
WORD_JOINER = "\u2060"

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
MODES = {"none": "nothink", "minimal": "nothink", "low": "think", "medium": "think", "high": "think", "xhigh": "think"}
# Change nothing about the answer.
HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prediction", "parallel_tool_calls"),
)
# Nothing is asked for by these values of what is not served.
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "verbosity": ("medium",),
    "audio": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Chat:
    """A chat request. ``pictures``: a data URL, URL or file id for each image mark of the messages, in order."""

    messages: list[Message]
    pictures: list[str]
    mode: str
    options: list[Options]  # one for each choice
    stream: bool
    include_usage: bool


class ChatReader:
    """Reads chat requests for one model. ``most_tokens``: the largest max_tokens, and what counts without one."""

    def __init__(self, processor: Processor, model: str, most_tokens: int):
        self.model, self.most_tokens, self._window = model, most_tokens, processor.config.context
        # A token stands for at most so many characters.
        self._longest = max(map(len, processor.tokenizer.get_vocab(with_added_tokens=True)))
        added = processor.tokenizer.get_added_tokens_decoder().values()
        special = {t.content for t in added if t.special or (t.content[0], t.content[-1]) == ("<", ">")} | {IMAGE_TOKEN}
        firsts = {text[0]: [re.escape(t[1:]) for t in special if t[0] == text[0]] for text in special}
        self._special = re.compile("|".join(f"{re.escape(c)}(?={'|'.join(rest)})" for c, rest in firsts.items()))

    def plain(self, text: str) -> str:
        """``text`` in which nothing is a special token or an image mark: behind the first character of each goes an
        invisible word joiner, so that it reads the same and is tokenized as ordinary text."""
        return self._special.sub(rf"\g<0>{WORD_JOINER}", text)

    def read(self, body: Any) -> Chat:
        """The request of a body. ApiError 400 naming the field that is wrong, 404 for another model's name."""
        fields = Fields.of(body, "the body") if not isinstance(body, dict) else Fields(body)
        model = fields.get("model", str, self.model)
        if model != self.model:
            raise ApiError(
                404, f"model: there is no {model[:100]!r} here, only {self.model!r}", "model", "model_not_found"
            )
        messages, pictures = self._messages(fields.need("messages", list))
        stream = fields.get("stream", bool, False)
        extra = fields.get("stream_options", dict, {})
        if extra and not stream:
            raise ApiError(400, "stream_options: only with stream true", "stream_options")
        of_stream = Fields(extra, "stream_options")
        include_usage = of_stream.get("include_usage", bool, False)
        of_stream.skip(["include_obfuscation"])
        of_stream.end()
        mode = _mode(fields)
        try:
            options = self._options(fields)
        except UserError as error:
            raise of_user_error(error) from None
        choices = fields.get("n", int, 1)
        if not 1 <= choices <= MOST_CHOICES:
            raise ApiError(400, f"n: {choices} must be 1 to {MOST_CHOICES}", "n")
        _nothing_else(fields)
        return Chat(messages, pictures, mode, [_seeded(options, i) for i in range(choices)], stream, include_usage)

    def _messages(self, given: list) -> tuple[list[Message], list[str]]:
        if not 1 <= len(given) <= MOST_MESSAGES:
            raise ApiError(400, f"messages: {len(given)} given; 1 to {MOST_MESSAGES} are accepted", "messages")
        tokens = sum(map(_characters, given)) // self._longest
        if tokens > self._window:  # whatever they are: no work is done for a text that is hopelessly long
            message = f"messages: at least {tokens} tokens; the model's window holds {self._window}"
            raise ApiError(400, message, "messages", "context_length_exceeded")
        messages: list[Message] = []
        pictures: list[str] = []
        for number, one in enumerate(given):
            fields = Fields.of(one, f"messages[{number}]")
            role = fields.need("role", str)
            if role not in ROLES:
                known = ", ".join(ROLES)
                raise ApiError(400, f"{fields.name('role')}: {role[:40]!r} is not one of {known}", fields.name("role"))
            text, shown = self._content(fields, ROLES[role])
            fields.skip(["name", "refusal", "annotations", "reasoning_content", "reasoning"])
            if fields.values.get("tool_calls") == []:
                fields.skip(["tool_calls"])
            fields.end()
            messages.append(Message(ROLES[role], text))
            pictures += shown
        if len(pictures) > MOST_PICTURES:
            raise ApiError(400, f"messages: {len(pictures)} images; at most {MOST_PICTURES} are accepted", "messages")
        return messages, pictures

    def _content(self, fields: Fields, role: str) -> tuple[str, list[str]]:
        """The text of a message, with an image mark for each of its pictures, and those."""
        content = fields.values.get("content")
        if not isinstance(content, list):
            return self._said(fields.need("content", str), role), []
        fields.skip(["content"])
        lines: list[str] = []
        pictures: list[str] = []
        for number, one in enumerate(content):
            part = Fields.of(one, f"{fields.name('content')}[{number}]")
            kind = part.need("type", str)
            if kind == "text":
                lines.append(self._said(part.need("text", str), role))
            elif kind in ("image_url", "file") and role == "user":
                pictures.append(_picture(part, kind))
                lines.append(IMAGE_TOKEN)
            else:
                raise ApiError(400, f"{part.name('type')}: {kind[:40]!r} is not served for {role}", part.name("type"))
            part.end()
        return "\n".join(lines), pictures  # as the model was taught: an image mark, a line's end, the question

    def _said(self, text: str, role: str) -> str:
        """Plain text; an earlier answer is repeated without its thought, as by clients that keep it apart."""
        if role == "assistant" and text.startswith(THINK):
            text = text.partition(THINK_END)[2].lstrip()
        return self.plain(text)

    def _options(self, fields: Fields) -> Options:
        limits = [(key, fields.get(key, int)) for key in ("max_completion_tokens", "max_tokens")]
        for key, value in limits:
            if value is not None and not 1 <= value <= self.most_tokens:
                raise ApiError(400, f"{key}: {value} must be 1 to {self.most_tokens}, the server's limit", key)
        given = [value for _, value in limits if value is not None]
        top = fields.get("top_logprobs", int)
        logprobs = fields.get("logprobs", bool, False)
        if top is not None and not logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs true", "top_logprobs")
        names = (
            ("temperature", float),
            ("top_p", float),
            ("min_p", float),
            ("repetition_penalty", float),
            ("top_k", int),
        )
        chosen = {key: value for key, kind in names if (value := fields.get(key, kind)) is not None}
        if chosen.get("top_k") == -1:  # every token, as other servers have it
            chosen["top_k"] = 0
        seed = fields.get("seed", int)
        return Options(
            max_new_tokens=min(given, default=self.most_tokens),
            sampling=Sampling(**chosen, seed=secrets.randbelow(LARGEST_SEED) if seed is None else seed % LARGEST_SEED),
            stop=_stops(fields),
            logprobs=(top or 0) if logprobs else None,
            max_thinking_tokens=fields.get("max_thinking_tokens", int),
            json_schema=_schema(fields),
            regex=_short(fields.get("guided_regex", str), "guided_regex"),
        )


def _seeded(options: Options, choice: int) -> Options:
    seed = (options.sampling.seed + choice) % LARGEST_SEED
    return replace(options, sampling=replace(options.sampling, seed=seed))


def _picture(part: Fields, kind: str) -> str:
    if kind == "file":
        inner = Fields(part.need("file", dict), part.name("file"))
        picture = inner.need("file_id", str)
    else:
        inner = Fields(part.need("image_url", dict), part.name("image_url"))
        picture = inner.need("url", str)
        inner.skip(["detail"])
    inner.end()
    return picture


def _mode(fields: Fields) -> str:
    """think, nothink or auto, from reasoning_effort or chat_template_kwargs. ApiError where they disagree."""
    modes: dict[str, str] = {}
    effort = fields.get("reasoning_effort", str)
    if effort is not None:
        if effort not in MODES:
            known = ", ".join(MODES)
            raise ApiError(400, f"reasoning_effort: {effort[:40]!r} is not one of {known}", "reasoning_effort")
        modes["reasoning_effort"] = MODES[effort]
    kwargs = Fields(fields.get("chat_template_kwargs", dict, {}), "chat_template_kwargs")
    mode = kwargs.get("mode", str)
    if mode is not None:
        if mode not in ("auto", "think", "nothink"):
            place = "chat_template_kwargs.mode"
            raise ApiError(400, f"{place}: {mode[:40]!r} is not one of auto, think, nothink", place)
        modes["chat_template_kwargs.mode"] = mode
    for key in ("enable_thinking", "thinking"):
        value = kwargs.get(key, bool)
        if value is not None:
            modes[kwargs.name(key)] = "think" if value else "nothink"
    kwargs.end()
    if len(set(modes.values())) > 1:
        said = ", ".join(f"{place} says {mode}" for place, mode in modes.items())
        raise ApiError(400, f"{said}: give one of them", next(iter(modes)))
    return next(iter(modes.values()), "auto")


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.values.get("stop")
    stops = fields.get("stop", list, []) if not isinstance(given, str) else [fields.need("stop", str)]
    if len(stops) > MOST_STOPS or not all(isinstance(s, str) and len(s) <= LONGEST_STOP for s in stops):
        raise ApiError(400, f"stop: must be at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters", "stop")
    for stop in stops:
        check_text(stop, "stop")
    return tuple(stops)


def _short(text: str | None, place: str) -> str | None:
    if text is not None and len(text) > LONGEST_CONSTRAINT:
        raise ApiError(400, f"{place}: {len(text)} characters; at most {LONGEST_CONSTRAINT} are accepted", place)
    return text


def _characters(message: Any) -> int:
    """How much text a message holds, whatever else it may be."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return sum(len(text) for text in texts if isinstance(text, str))


def _schema(fields: Fields) -> dict[str, Any] | None:
    given = Fields(fields.get("response_format", dict, {"type": "text"}), "response_format")
    kind = given.need("type", str)
    schema: dict[str, Any] | None = None
    if kind == "json_object":
        schema = {"type": "object"}
    elif kind == "json_schema":
        inner = Fields(given.need("json_schema", dict), "response_format.json_schema")
        schema = inner.need("schema", dict)
        check_depth(schema, inner.name("schema"))
        _short(str(schema), inner.name("schema"))
        check_text(str(schema), inner.name("schema"))
        inner.skip(["name", "strict", "description"])
        inner.end()
    elif kind != "text":
        place = "response_format.type"
        raise ApiError(400, f"{place}: {kind[:40]!r} is not one of text, json_object, json_schema", place)
    given.end()
    return schema


def _nothing_else(fields: Fields) -> None:
    fields.skip(HARMLESS)
    fields.skip(key for key, values in NEUTRAL.items() if fields.values.get(key) in values)
    fields.end()
