"""Training records: JSON Lines in the report's format, read strictly.

One object a line: ``{"image": "a.png" or ["a.png", …], "conversations": [[turn, turn, …], …]}`` with turns
``{"from": "human" or "gpt", "value": "…"}``. Each inner list is a conversation about the same images. Also
read: ``conversations`` as one flat list of turns; a leading ``"system"`` turn; no ``image`` (or null, or an
empty list) for text alone; an image in a tar archive, ``shard.tar/a.png``; and one image without any ``<image>``
mark, as in the report's second example: the mark and a line break then go in front of the first human turn.
Other keys are ignored.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from phi4rv.errors import UserError
from phi4rv.processing.answers import find_non_finite
from phi4rv.processing.chat_template import IMAGE_TOKEN, Message
from phi4rv.processing.image_files import ImageFiles

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Record:
    """One conversation: the images of its ``<image>`` marks in order, its turns, and ``file.jsonl:12``."""

    images: list[Path]
    turns: list[Message]
    where: str


def _report_skipped(message: str) -> None:
    print(f"skipped: {message}", file=sys.stderr)


def read_records(
    path: Path,
    image_root: Path | None = None,
    skip_bad: bool = False,
    on_bad: Callable[[str], None] = _report_skipped,
) -> Iterator[Record]:
    """Yield every conversation of a ``.jsonl`` or ``.jsonl.gz`` file.

    Relative image paths start at ``image_root``, or else at the file's own folder. A bad line raises
    UserError ("file:line: what is wrong; what would be right"). With ``skip_bad`` the whole line is left out
    and that message goes to ``on_bad`` instead. A file that cannot be read to its end, or that holds no
    usable record, raises UserError in either case.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    files = ImageFiles()
    good, bad = 0, 0
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        try:
            records = parse_line(line, f"{path}:{number}", root, files)
        except UserError as error:
            if not skip_bad:
                raise
            bad += 1
            on_bad(str(error))
            continue
        good += 1
        yield from records
    if not good:
        found = f"all {bad} lines are bad" if bad else "it is empty"
        raise UserError(f"{path}: no records, {found}; give at least one good JSON object on a line")


def _read_lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip stream is broken ({error}); give a whole .gz file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a JSON Lines file") from error


def parse_line(line: bytes, where: str, root: Path, files: ImageFiles) -> list[Record]:
    """The conversations of one line. ``where``: what errors and the records call it. ``root``: of image paths."""
    data = _parse_json(line, where)
    if not isinstance(data, dict):
        raise UserError(f"{where}: {_json_type(data)} where a record belongs; write one JSON object on each line")
    images = _parse_images(data.get("image"), where, root, files)
    if "conversations" not in data:
        raise UserError(f"{where}: 'conversations' is missing; give a list of lists of turns")
    conversations = data["conversations"]
    if not isinstance(conversations, list) or not conversations:
        raise UserError(f"{where}: 'conversations' is {_json_type(conversations)}; give a list of lists of turns")
    if all(isinstance(item, dict) for item in conversations):
        conversations = [conversations]
    records = []
    for number, conversation in enumerate(conversations, 1):
        prefix = f"{where}: " if len(conversations) == 1 else f"{where}: conversation {number}: "
        records.append(Record(images, _parse_turns(conversation, len(images), prefix), where))
    return records


def _parse_json(line: bytes, where: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise UserError(f"{where}: {constant} is not JSON; write a finite number")

    try:
        return json.loads(line.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: broken JSON at column {error.colno}: {error.msg}; write one whole object on each line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: JSON with a number too long or nested too deeply; simplify it") from error


def _parse_images(value: Any, where: str, root: Path, files: ImageFiles) -> list[Path]:
    """The images' paths, each a file or a tar archive's member. ``..`` may leave ``root``, as an absolute path may."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    images = []
    for name in names:
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: 'image' has {_json_type(name)} in it; give a path, or a list of paths")
        image = root / name
        try:
            files.check(image)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        images.append(image)
    return images


def _parse_turns(conversation: Any, images: int, prefix: str) -> list[Message]:
    if not isinstance(conversation, list) or not conversation:
        raise UserError(f"{prefix}the conversation is {_json_type(conversation)}; give a list of turns")
    turns = [_parse_turn(turn, f"{prefix}turn {number}") for number, turn in enumerate(conversation, 1)]
    _check_order([turn["from"] for turn in turns], prefix)
    messages = [Message(_ROLES[turn["from"]], turn["value"]) for turn in turns]
    marks = sum(message.content.count(IMAGE_TOKEN) for message in messages)
    if marks == 0 and images == 1:
        first = next(index for index, message in enumerate(messages) if message.role == "user")
        messages[first] = Message("user", f"{IMAGE_TOKEN}\n{messages[first].content}")
    elif marks != images:
        raise UserError(f"{prefix}{IMAGE_TOKEN} marks: {marks}, images: {images}; write one mark where each image goes")
    return messages


def _parse_turn(turn: Any, prefix: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise UserError(f"{prefix} is {_json_type(turn)}; a turn is an object with 'from' and 'value'")
    for key in ("from", "value"):
        if key not in turn:
            raise UserError(f"{prefix}: {key!r} is missing; a turn has 'from' and 'value'")
    role, value = turn["from"], turn["value"]
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{prefix} is from {role!r}; 'from' is one of {', '.join(_ROLES)}")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{prefix}: 'value' is {_json_type(value)}; give the turn's text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{prefix}: half a surrogate pair in the text; write whole characters") from error
    if role != "human" and IMAGE_TOKEN in value:
        raise UserError(f"{prefix}: an {IMAGE_TOKEN} mark in a {role} turn; only human turns show images")
    if role == "gpt" and (found := find_non_finite(value)):
        raise UserError(f"{prefix}: {found} is not a place in an image; coordinates are numbers in [0, 1]")
    return turn


def _check_order(roles: list[str], prefix: str) -> None:
    """An optional system turn, then human and gpt in turn, beginning with human and ending with gpt."""
    first = 1 if roles[0] == "system" else 0
    for index in range(first, len(roles)):
        expected = ("human", "gpt")[(index - first) % 2]
        if roles[index] != expected:
            again = " again" if index and roles[index] == roles[index - 1] else ""
            raise UserError(
                f"{prefix}turn {index + 1} is from {roles[index]}{again}; human and gpt alternate, so here "
                f"comes {expected}"
            )
    if roles[-1] != "gpt":
        raise UserError(f"{prefix}the last turn is from {roles[-1]}; end with a gpt turn, the answer to learn")


def _json_type(value: Any) -> str:
    """What a JSON value is, in the words of JSON."""
    if value is None:
        return "null"
    names: dict[type, str] = {str: "string", list: "list", dict: "object", bool: "boolean"}
    noun = names.get(type(value), "number")
    if noun in ("string", "list", "object") and (not value or (noun == "string" and not value.strip())):
        return f"an empty {noun}"
    return f"an {noun}" if noun == "object" else f"a {noun}"
