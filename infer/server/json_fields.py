"""Validation of JSON objects from outside, field by field, with errors that name the field."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from infer.server.errors import ApiError

MAX_NUMBER = 2**31 - 1
MAX_DEPTH = 50
_REQUIRED: Any = object()
_TYPE_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass
class Fields:
    """The fields of a JSON object, read one by one; null counts as absent. ``path`` is what errors call it."""

    values: dict[str, Any]
    path: str = ""
    known: set[str] = field(default_factory=set)

    @staticmethod
    def from_value(value: Any, path: str) -> Fields:
        if not isinstance(value, dict):
            raise ApiError(400, f"{path}: must be an object", path)
        return Fields(value, path)

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value, of this type: an integer is a number too, true and false are neither. ApiError 400 otherwise."""
        self.known.add(key)
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ApiError(400, f"{self.name(key)}: missing; give {_TYPE_NAMES[kind]}", self.name(key))
            return default
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise ApiError(400, f"{self.name(key)}: must be {_TYPE_NAMES[kind]}", self.name(key))
        # The engine computes with numbers of 32 bits; a seed is reduced to what it takes.
        if kind in (int, float) and key != "seed" and not abs(value) <= MAX_NUMBER:
            raise ApiError(400, f"{self.name(key)}: {str(value)[:20]} is out of range", self.name(key))
        if kind is str:
            check_text(value, self.name(key))
        return value

    def require(self, key: str, kind: type) -> Any:
        return self.get(key, kind, _REQUIRED)

    def ignore(self, keys: Iterable[str]) -> None:
        self.known.update(keys)

    def reject_unknown(self) -> None:
        """ApiError 400 for a field that was neither read nor ignored and is not null."""
        for key in self.values.keys() - self.known:
            if self.values[key] is not None:
                shown = self.name(key[:100])
                raise ApiError(400, f"{shown}: not supported; leave it out", shown, "unsupported_parameter")


def check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{path}: holds half of a surrogate pair, which is no character", path) from None


def check_depth(value: Any, path: str) -> None:
    """ApiError 400 for JSON nested so deep that a recursive parser would fail."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for one in level for inner in _children(one)]
    if level:
        raise ApiError(400, f"{path}: nested more than {MAX_DEPTH} deep", path)


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
