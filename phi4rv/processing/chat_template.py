"""Conversations to prompt text: the Jinja template that ships with a checkpoint, rendered in a sandbox."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi4rv.errors import UserError

IMAGE_TOKEN = "<image>"
THINK = "<think>"
NOTHINK = "<|dummy_84|>"  # the released tokenizer's spelling of the report's <nothink>
END_OF_TURN = "<|im_end|>"
MODES = ("auto", "think", "nothink")
ROLES = ("user", "assistant", "system")

# Names with a space cannot be spelled by a template, so no template can read or print the marks itself.
_OPEN, _CLOSE = "generation start", "generation end"


@dataclass(frozen=True)
class Message:
    """One turn: ``role`` is one of ``ROLES``, ``content`` its text, with ``<image>`` where an image goes."""

    role: str
    content: str


@dataclass(frozen=True)
class RenderedChat:
    """Rendered text, and the ``[start, end)`` character spans of it that the assistant wrote, in order.

    A span is what a ``{% generation %}`` block rendered, without the white space that follows a closing
    ``<|im_end|>``: generation stops at that token, so nothing behind it can be a target.
    """

    text: str
    spans: list[tuple[int, int]]


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}``: renders as its content, between two marks of the context."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it on the class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(name: str) -> nodes.Node:
            value = nodes.Getitem(nodes.ContextReference(), nodes.Const(name), "load")
            return nodes.Output([value]).set_lineno(line)

        return [mark(_OPEN), nodes.Scope(body).set_lineno(line), mark(_CLOSE)]


class _Undefined(StrictUndefined):
    """Printing or comparing what does not exist is an error; ``{% if tools %}`` asks whether it exists."""

    __bool__ = Undefined.__bool__  # type: ignore[assignment]


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which would turn "<image>" into "\u003cimage\u003e".
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Undefined,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    return environment


def check_mode(mode: str) -> None:
    """Raise UserError unless ``mode`` is one of ``MODES``."""
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")


class ChatTemplate:
    """A checkpoint's chat template.

    ``source`` is the Jinja text, ``name`` the file that errors name, ``variables`` what the template may read
    beside the messages (``bos_token``, ``eos_token``), ``nothink_token`` what the mode "nothink" appends.
    Raises UserError, naming file and line, for a syntax error.
    """

    def __init__(
        self,
        source: str,
        name: str = "chat_template.jinja",
        variables: Mapping[str, str] = MappingProxyType({}),
        nothink_token: str = NOTHINK,
    ) -> None:
        self.name = name
        self._variables = dict(variables)
        self._suffix = {"auto": "", "think": THINK, "nothink": nothink_token}
        environment = _environment()
        try:
            code = environment.compile(source, name=name, filename=name)
        except TemplateSyntaxError as error:
            raise UserError(f"{name}:{error.lineno}: not a valid template: {_one_line(error)}") from error
        self._template = Template.from_code(environment, code, environment.make_globals(None))

    def render(
        self, messages: Sequence[Message], mode: str = "auto", add_generation_prompt: bool = True
    ) -> RenderedChat:
        """Render ``messages`` to the text that the model reads.

        With ``add_generation_prompt`` the text ends where the assistant's answer begins, followed by
        ``<think>`` (mode "think") or the direct-answer token ("nothink"). Without it the text is a training
        row: mode must be "auto", and the template must mark the assistant's text with ``{% generation %}``.
        Raises UserError for bad messages, for a template that fails, and for one that drops a system or a
        user message.
        """
        check_mode(mode)
        _check_messages(messages, add_generation_prompt)
        if mode != "auto" and not add_generation_prompt:
            raise UserError(f"mode {mode!r} needs add_generation_prompt: it goes where the answer begins")
        text = self._run(messages, add_generation_prompt)
        self._check_nothing_dropped(messages, text, add_generation_prompt)
        spans = self._find_spans(messages, text, add_generation_prompt)
        if not add_generation_prompt and not spans and any(m.role == "assistant" for m in messages):
            raise UserError(
                f"{self.name}: training needs the template to put the assistant's text between "
                "{% generation %} and {% endgeneration %}, and no such block was rendered"
            )
        return RenderedChat(text + self._suffix[mode], spans)

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool, marks: tuple[str, str] = ("", "")) -> str:
        context = {
            **self._variables,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            _OPEN: marks[0],
            _CLOSE: marks[1],
        }
        try:
            return self._template.render(context)
        except Exception as error:  # whatever a template raises, be it a ZeroDivisionError, is its own fault
            reason = _one_line(error) or type(error).__name__
            raise UserError(f"{self.name}:{self._line_of(error)}: the template failed: {reason}") from error

    def _line_of(self, error: Exception) -> int:
        line, trace = 1, error.__traceback__
        while trace is not None:  # Jinja rewrites the traceback to the template's own file and lines
            if trace.tb_frame.f_code.co_filename == self.name:
                line = trace.tb_lineno
            trace = trace.tb_next
        return line

    def _check_nothing_dropped(self, messages: Sequence[Message], text: str, add_generation_prompt: bool) -> None:
        for number, message in enumerate(messages, 1):
            if message.role == "user" and message.content.strip() not in text:
                raise UserError(f"{self.name}: the template drops or changes message {number}, from the user")
        # A system message may happen to repeat the template's own words, so look for one that cannot.
        probes = {
            number: Message(message.role, secrets.token_hex(16))
            for number, message in enumerate(messages)
            if message.role == "system" and message.content.strip()
        }
        if not probes:
            return
        probed = self._run(
            [probes.get(number, message) for number, message in enumerate(messages)], add_generation_prompt
        )
        for number, probe in probes.items():
            if probe.content not in probed or messages[number].content.strip() not in text:
                raise UserError(
                    f"{self.name}: the template ignores system messages: write the instruction in the user's"
                )

    def _find_spans(self, messages: Sequence[Message], text: str, add_generation_prompt: bool) -> list[tuple[int, int]]:
        # Random marks cannot occur in a message. Where a filter of the template changes them, or they change
        # what it does, the marked text differs from the plain one and no span would be right.
        marks = (secrets.token_hex(16), secrets.token_hex(16))
        pieces = re.split("({}|{})".format(*marks), self._run(messages, add_generation_prompt, marks))
        found = pieces[1::2]
        if "".join(pieces[0::2]) != text or found != list(marks) * (len(found) // 2):
            raise UserError(
                f"{self.name}: cannot tell what the assistant wrote: a generation block must not be "
                "nested, left by break or continue, or passed through a filter"
            )
        spans, position = [], 0
        for index, piece in enumerate(pieces[0::2]):
            if index % 2 == 1:
                end = position + len(piece)
                if piece.rstrip().endswith(END_OF_TURN):
                    end = position + len(piece.rstrip())
                if end > position:
                    spans.append((position, end))
            position += len(piece)
        return spans


def split_at_images(rendered: RenderedChat | str, images: int) -> list[str]:
    """Split a prompt at its ``<image>`` marks into ``images + 1`` pieces; UserError if the counts differ."""
    text = rendered.text if isinstance(rendered, RenderedChat) else rendered
    pieces = text.split(IMAGE_TOKEN)
    if len(pieces) - 1 != images:
        raise UserError(
            f"the prompt has {_count(len(pieces) - 1, f'{IMAGE_TOKEN} mark')} for {_count(images, 'image')}: "
            "write one mark where each image goes, in the images' order"
        )
    return pieces


def _check_messages(messages: Sequence[Message], add_generation_prompt: bool) -> None:
    if not messages:
        raise UserError("no messages: give at least one message from the user")
    for number, message in enumerate(messages, 1):
        if message.role not in ROLES:
            raise UserError(f"message {number} has the unknown role {message.role!r}: use {', '.join(ROLES)}")
        if message.role != "user" and IMAGE_TOKEN in message.content:
            raise UserError(f"message {number} ({message.role}) has an {IMAGE_TOKEN} mark: only the user shows images")
    if add_generation_prompt and messages[-1].role != "user":
        raise UserError(f"the last message is from {messages[-1].role!r}: an answer follows a user's message")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
