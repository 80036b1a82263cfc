"""OpenAI's chat request: JSON -> messages, images and SamplingParams. A field that would change the answer and is not
supported is an error that names it."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from infer.requests.sampling_params import MAX_SEED, SamplingParams
from infer.server.errors import ApiError, from_user_error
from infer.server.json_fields import Fields, check_depth, check_text
from phi4rv.errors import UserError
from phi4rv.processing.answers import THINK_END
from phi4rv.processing.chat_template import IMAGE_TOKEN, THINK, Message
from phi4rv.processing.processor import Processor

MAX_CHOICES = 8
MAX_MESSAGES = 512
MAX_IMAGES = 16
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_GRAMMAR_CHARACTERS = 64 * 1024
WORD_JOINER = "\u2060"

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
MODES = {"none": "nothink", "minimal": "nothink", "low": "think", "medium": "think", "high": "think", "xhigh": "think"}
# Fields without effect on the answer.
IGNORED_FIELDS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prediction", "parallel_tool_calls"),
)
# Values that request nothing, of fields that are not supported.
NEUTRAL_VALUES = {
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
class ChatCompletionRequest:
    """A chat request. ``images``: a data URL, URL or file id for each image mark of the messages, in order."""

    messages: list[Message]
    images: list[str]
    mode: str
    sampling_params: list[SamplingParams]  # one for each choice
    stream: bool
    include_usage: bool


class ChatRequestParser:
    """Parses chat requests for one model. ``max_tokens``: the largest that may be requested, and the default."""

    def __init__(self, processor: Processor, model: str, max_tokens: int):
        self.model, self.max_tokens, self._window = model, max_tokens, processor.config.context
        self._max_token_characters = max(map(len, processor.tokenizer.get_vocab(with_added_tokens=True)))
        added = processor.tokenizer.get_added_tokens_decoder().values()
        special = {t.content for t in added if t.special or (t.content[0], t.content[-1]) == ("<", ">")} | {IMAGE_TOKEN}
        firsts = {text[0]: [re.escape(t[1:]) for t in special if t[0] == text[0]] for text in special}
        self._special = re.compile("|".join(f"{re.escape(c)}(?={'|'.join(rest)})" for c, rest in firsts.items()))

    def escape_special_tokens(self, text: str) -> str:
        """``text`` without special tokens and image marks: an invisible word joiner behind the first character of each
        makes it tokenize as ordinary text and read the same."""
        return self._special.sub(rf"\g<0>{WORD_JOINER}", text)

    def parse(self, body: Any) -> ChatCompletionRequest:
        """The request in a JSON body. ApiError 400 naming the field that is wrong, 404 for another model's name."""
        fields = Fields.from_value(body, "the body") if not isinstance(body, dict) else Fields(body)
        model = fields.get("model", str, self.model)
        if model != self.model:
            raise ApiError(
                404, f"model: there is no {model[:100]!r} here, only {self.model!r}", "model", "model_not_found"
            )
        messages, images = self._messages(fields.require("messages", list))
        stream = fields.get("stream", bool, False)
        extra = fields.get("stream_options", dict, {})
        if extra and not stream:
            raise ApiError(400, "stream_options: only with stream true", "stream_options")
        stream_options = Fields(extra, "stream_options")
        include_usage = stream_options.get("include_usage", bool, False)
        stream_options.ignore(["include_obfuscation"])
        stream_options.reject_unknown()
        mode = _mode(fields)
        try:
            params = self._sampling_params(fields)
        except UserError as error:
            raise from_user_error(error) from None
        choices = fields.get("n", int, 1)
        if not 1 <= choices <= MAX_CHOICES:
            raise ApiError(400, f"n: {choices} must be 1 to {MAX_CHOICES}", "n")
        _reject_unsupported(fields)
        seeded = [replace(params, seed=(params.seed + i) % (MAX_SEED + 1)) for i in range(choices)]
        return ChatCompletionRequest(messages, images, mode, seeded, stream, include_usage)

    def _messages(self, given: list) -> tuple[list[Message], list[str]]:
        if not 1 <= len(given) <= MAX_MESSAGES:
            raise ApiError(400, f"messages: {len(given)} given; 1 to {MAX_MESSAGES} are accepted", "messages")
        tokens = sum(map(_characters, given)) // self._max_token_characters
        if tokens > self._window:  # no work is done for a text that is certainly too long
            message = f"messages: at least {tokens} tokens; the model's window holds {self._window}"
            raise ApiError(400, message, "messages", "context_length_exceeded")
        messages: list[Message] = []
        images: list[str] = []
        for number, one in enumerate(given):
            fields = Fields.from_value(one, f"messages[{number}]")
            role = fields.require("role", str)
            if role not in ROLES:
                known = ", ".join(ROLES)
                raise ApiError(400, f"{fields.name('role')}: {role[:40]!r} is not one of {known}", fields.name("role"))
            text, sources = self._content(fields, ROLES[role])
            fields.ignore(["name", "refusal", "annotations", "reasoning_content", "reasoning"])
            if fields.values.get("tool_calls") == []:
                fields.ignore(["tool_calls"])
            fields.reject_unknown()
            messages.append(Message(ROLES[role], text))
            images += sources
        if len(images) > MAX_IMAGES:
            raise ApiError(400, f"messages: {len(images)} images; at most {MAX_IMAGES} are accepted", "messages")
        return messages, images

    def _content(self, fields: Fields, role: str) -> tuple[str, list[str]]:
        """The text of a message, with an image mark for each of its images, and the images' sources."""
        content = fields.values.get("content")
        if not isinstance(content, list):
            return self._text(fields.require("content", str), role), []
        fields.ignore(["content"])
        lines: list[str] = []
        images: list[str] = []
        for number, one in enumerate(content):
            part = Fields.from_value(one, f"{fields.name('content')}[{number}]")
            kind = part.require("type", str)
            if kind == "text":
                lines.append(self._text(part.require("text", str), role))
            elif kind in ("image_url", "file") and role == "user":
                images.append(_image_source(part, kind))
                lines.append(IMAGE_TOKEN)
            else:
                raise ApiError(400, f"{part.name('type')}: {kind[:40]!r} is not served for {role}", part.name("type"))
            part.reject_unknown()
        return "\n".join(lines), images  # as the model was taught: an image mark, a line's end, the question

    def _text(self, text: str, role: str) -> str:
        """Text of a message; an earlier answer loses its thought, as from clients that keep it apart."""
        if role == "assistant" and text.startswith(THINK):
            text = text.partition(THINK_END)[2].lstrip()
        return self.escape_special_tokens(text)

    def _sampling_params(self, fields: Fields) -> SamplingParams:
        limits = [(key, fields.get(key, int)) for key in ("max_completion_tokens", "max_tokens")]
        for key, value in limits:
            if value is not None and not 1 <= value <= self.max_tokens:
                raise ApiError(400, f"{key}: {value} must be 1 to {self.max_tokens}, the server's limit", key)
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
        return SamplingParams(
            **chosen,
            seed=secrets.randbelow(MAX_SEED + 1) if seed is None else seed % (MAX_SEED + 1),
            max_new_tokens=min(given, default=self.max_tokens),
            stop=_stop_strings(fields),
            logprobs=(top or 0) if logprobs else None,
            max_thinking_tokens=fields.get("max_thinking_tokens", int),
            json_schema=_json_schema(fields),
            regex=_check_length(fields.get("guided_regex", str), "guided_regex"),
        )


def _image_source(part: Fields, kind: str) -> str:
    if kind == "file":
        inner = Fields(part.require("file", dict), part.name("file"))
        source = inner.require("file_id", str)
    else:
        inner = Fields(part.require("image_url", dict), part.name("image_url"))
        source = inner.require("url", str)
        inner.ignore(["detail"])
    inner.reject_unknown()
    return source


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
    kwargs.reject_unknown()
    if len(set(modes.values())) > 1:
        conflict = ", ".join(f"{place} says {mode}" for place, mode in modes.items())
        raise ApiError(400, f"{conflict}: give one of them", next(iter(modes)))
    return next(iter(modes.values()), "auto")


def _stop_strings(fields: Fields) -> tuple[str, ...]:
    given = fields.values.get("stop")
    stops = fields.get("stop", list, []) if not isinstance(given, str) else [fields.require("stop", str)]
    if len(stops) > MAX_STOPS or not all(isinstance(s, str) and len(s) <= MAX_STOP_CHARACTERS for s in stops):
        limits = f"at most {MAX_STOPS} strings of at most {MAX_STOP_CHARACTERS} characters"
        raise ApiError(400, f"stop: must be {limits}", "stop")
    for stop in stops:
        check_text(stop, "stop")
    return tuple(stops)


def _check_length(text: str | None, place: str) -> str | None:
    if text is not None and len(text) > MAX_GRAMMAR_CHARACTERS:
        raise ApiError(400, f"{place}: {len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS} are accepted", place)
    return text


def _characters(message: Any) -> int:
    """How much text a message that is not validated yet holds."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return sum(len(text) for text in texts if isinstance(text, str))


def _json_schema(fields: Fields) -> dict[str, Any] | None:
    given = Fields(fields.get("response_format", dict, {"type": "text"}), "response_format")
    kind = given.require("type", str)
    schema: dict[str, Any] | None = None
    if kind == "json_object":
        schema = {"type": "object"}
    elif kind == "json_schema":
        inner = Fields(given.require("json_schema", dict), "response_format.json_schema")
        schema = inner.require("schema", dict)
        check_depth(schema, inner.name("schema"))
        _check_length(str(schema), inner.name("schema"))
        check_text(str(schema), inner.name("schema"))
        inner.ignore(["name", "strict", "description"])
        inner.reject_unknown()
    elif kind != "text":
        place = "response_format.type"
        raise ApiError(400, f"{place}: {kind[:40]!r} is not one of text, json_object, json_schema", place)
    given.reject_unknown()
    return schema


def _reject_unsupported(fields: Fields) -> None:
    fields.ignore(IGNORED_FIELDS)
    fields.ignore(key for key, values in NEUTRAL_VALUES.items() if fields.values.get(key) in values)
    fields.reject_unknown()
