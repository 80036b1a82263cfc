"""JSON objects from outside, taken apart field by field with errors that name the field."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from infer.server.errors import ApiError

LARGEST_NUMBER = 2**31 - 1
DEEPEST = 50
_MISSING: Any = object()
_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass
class Fields:
    """The fields of a JSON object, taken one by one; null counts as absent. ``place`` is what errors call it."""

    values: dict[str, Any]
    place: str = ""
    taken: set[str] = field(default_factory=set)

    @staticmethod
    def of(value: Any, place: str) -> Fields:
        if not isinstance(value, dict):
            raise ApiError(400, f"{place}: must be an object", place)
        return Fields(value, place)

    def name(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value, of this kind: an integer is a number too, true and false are neither. ApiError 400 otherwise."""
        self.taken.add(key)
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise ApiError(400, f"{self.name(key)}: missing; give {_NAMES[kind]}", self.name(key))
            return default
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise ApiError(400, f"{self.name(key)}: must be {_NAMES[kind]}", self.name(key))
        # The engine computes with numbers of 32 bits; a seed is reduced to what it takes.
        if kind in (int, float) and key != "seed" and not abs(value) <= LARGEST_NUMBER:
            raise ApiError(400, f"{self.name(key)}: {str(value)[:20]} is out of range", self.name(key))
        if kind is str:
            check_text(value, self.name(key))
        return value

    def need(self, key: str, kind: type) -> Any:
        return self.get(key, kind, _MISSING)

    def skip(self, keys: Iterable[str]) -> None:
        self.taken.update(keys)

    def end(self) -> None:
        """ApiError 400 for a field that nobody has taken and that is not null."""
        for key in self.values.keys() - self.taken:
            if self.values[key] is not None:
                shown = self.name(key[:100])
                raise ApiError(400, f"{shown}: not supported; leave it out", shown, "unsupported_parameter")


def check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{place}: holds half of a surrogate pair, which is no character", place) from None


def check_depth(value: Any, place: str) -> None:
    """ApiError 400 for JSON nested so deep that a parser with a stack would give up."""
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in _within(one)]
    if level:
        raise ApiError(400, f"{place}: nested more than {DEEPEST} deep", place)


def _within(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
