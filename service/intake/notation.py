"""YAML or JSON text to plain values: dict, list, str, int, float, bool, None. Bounded, and nothing is ever constructed.

PyYAML is used for its events only (the pure part of a YAML reader); scalars are resolved here by the core schema of
YAML 1.2.2 section 10.3, so `no`, `on`, `1_000`, `1:30` and `2026-01-01` are text. Where YAML 1.1 and 1.2 read a number
differently (`0644`) neither is guessed: it is an error that says what to write.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

Place = tuple[str | int, ...]
"""Keys and list positions from the top; positions count from 0 here."""

MAX_DEPTH = 32
MAX_NODES = 20_000
MAX_NUMBER_CHARS = 64
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""Matches wherever it starts, to the end of the text if need be: so that a search is linear in it."""
_CONSTANTS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_INTEGER = re.compile(r"[-+]?[0-9]+", re.ASCII)
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", re.ASCII)
_STARTS_A_NUMBER = frozenset("+-.0123456789")


class NotationError(Exception):
    """Where and why; the one thing that `read_yaml` and `read_json` raise."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place
        self.message = message


def read_yaml(data: bytes, *, max_bytes: int) -> Any:
    """One document, YAML 1.2 or JSON. Raises NotationError."""
    text = _decoded(data, max_bytes=max_bytes)
    if text.lstrip()[:1] in ("{", "["):
        try:
            return _checked(_json_value(text))
        except json.JSONDecodeError:
            pass  # YAML's own flow style starts like this too
    return _checked(_yaml_value(text))


def read_json(data: bytes, *, max_bytes: int) -> Any:
    """One JSON value. Raises NotationError."""
    try:
        return _checked(_json_value(_decoded(data, max_bytes=max_bytes)))
    except json.JSONDecodeError as error:
        raise NotationError((), f"should be JSON; line {error.lineno}, column {error.colno}: {error.msg}") from None


def _decoded(data: bytes, *, max_bytes: int) -> str:
    if len(data) > max_bytes:
        raise NotationError((), f"should be at most {max_bytes} bytes; it is {len(data)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotationError((), f"should be UTF-8; byte {error.start} is not") from None


def _json_value(text: str) -> Any:
    """Raises NotationError for what is JSON and not accepted, JSONDecodeError for what is not JSON."""
    structure = _JSON_STRING.sub("", text)
    if structure.count(",") + structure.count("[") + structure.count("{") > MAX_NODES:
        raise NotationError((), f"should hold at most {MAX_NODES} values")
    try:
        return json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_int=_int, parse_float=_float
        )
    except RecursionError:
        raise _too_deep(()) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise NotationError((), f"the key {twice[:100]!r} stands twice in one mapping")
    return out


def _no_constant(word: str) -> NoReturn:
    raise NotationError((), f"{word} is not a number that is accepted; numbers should be finite")


def _int(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARS:
        raise NotationError((), f"a number should have at most {MAX_NUMBER_CHARS} digits; put it in quotes as text")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= MAX_NUMBER_CHARS else math.inf
    if not math.isfinite(value):
        raise NotationError((), f"the number {text[:MAX_NUMBER_CHARS]} is too large; numbers should be finite")
    return value


@dataclass(slots=True)
class _Open:
    """A collection whose end has not been read: a list, or a mapping and the key whose value comes next."""

    value: dict[str, Any] | list[Any]
    key: str | None = None


@dataclass(slots=True)
class _Builder:
    """Puts YAML's events together, iteratively."""

    root: Any = None
    documents: int = 0
    nodes: int = 0
    stack: list[_Open] = field(default_factory=list)

    def place(self) -> Place:
        """Of the value that comes next."""
        out: list[str | int] = []
        for opened in self.stack:
            if isinstance(opened.value, list):
                out.append(len(opened.value) - (opened is not self.stack[-1]))
            elif opened.key is not None:
                out.append(opened.key)
        return tuple(out)

    def refuse(self, message: str) -> NoReturn:
        raise NotationError(self.place(), message)

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.AliasEvent):
            self.refuse("aliases (*name) are not accepted; write the value out")
        elif isinstance(event, yaml.NodeEvent):
            self._take_node(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.stack.pop()
        elif isinstance(event, yaml.DocumentStartEvent):
            self._take_document(event)

    def _take_document(self, event: yaml.DocumentStartEvent) -> None:
        self.documents += 1
        if self.documents > 1:
            raise NotationError((), "should be one document; there is a second one after ---")
        if event.tags or event.version not in (None, (1, 2)):
            raise NotationError((), "directives (%TAG, %YAML 1.1) are not accepted")

    def _take_node(self, event: Any) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise NotationError((), f"should hold at most {MAX_NODES} values")
        if event.anchor is not None:
            self.refuse("anchors (&name) are not accepted; write the value out where it is used")
        if event.tag is not None:
            self.refuse("tags (!name) are not accepted")
        if isinstance(event, yaml.ScalarEvent):
            self._put(self._scalar(event.value) if event.implicit[0] else event.value)
            return
        value: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        if len(self.stack) >= MAX_DEPTH:
            raise _too_deep(self.place())
        self._put(value)
        self.stack.append(_Open(value))

    def _put(self, value: Any) -> None:
        if not self.stack:
            self.root = value
            return
        opened = self.stack[-1]
        if isinstance(opened.value, list):
            opened.value.append(value)
        elif opened.key is None:
            if not isinstance(value, str):
                self.refuse("a key should be text; put it in quotes")
            if value in opened.value:
                self.refuse(f"the key {value[:100]!r} stands twice in one mapping")
            opened.key = value
        else:
            opened.value[opened.key] = value
            if not isinstance(value, dict | list):
                opened.key = None

    def close_value(self) -> None:
        """A collection has ended: whatever holds it may go on to its next key."""
        if self.stack:
            self.stack[-1].key = None

    def _scalar(self, text: str) -> Any:
        """A plain scalar by the core schema."""
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if text[0] not in _STARTS_A_NUMBER:
            return text
        try:
            if _INTEGER.fullmatch(text):
                digits = text.lstrip("+-")
                if digits[0] == "0" and len(digits) > 1:
                    self.refuse(f"{text[:40]} starts with a zero: write 0o... for octal, or put it in quotes for text")
                return _int(text)
            if _OTHER_BASE.fullmatch(text):
                return int(text, 0) if len(text) <= MAX_NUMBER_CHARS else _int(text)
            if _FLOAT.fullmatch(text):
                return _float(text)
        except NotationError as error:
            self.refuse(error.message)
        if _NOT_FINITE.fullmatch(text):
            self.refuse(f"{text} is not a number that is accepted; numbers should be finite")
        return text


def _yaml_value(text: str) -> Any:
    builder = _Builder()
    try:
        for event in _events(text):
            builder.take(event)
            if isinstance(event, yaml.CollectionEndEvent):
                builder.close_value()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise NotationError((), f"should be YAML or JSON; {where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise NotationError((), f"should be YAML or JSON; {_reader_problem(error)}") from None
    return builder.root


def _events(text: str) -> Iterator[yaml.Event]:
    yield from yaml.parse(text, Loader=_LOADER)


def _reader_problem(error: Exception) -> str:
    position, reason = getattr(error, "position", None), getattr(error, "reason", None)
    return f"character {position}: {reason}" if isinstance(position, int) else "it could not be read"


def _checked(value: Any) -> Any:
    """What both notations may still bring in: depth (JSON), and text that no UTF-8 encoder takes."""
    pending: list[tuple[Place, Any]] = [((), value)]
    nodes = 0
    while pending:
        place, item = pending.pop()
        nodes += 1
        if len(place) >= MAX_DEPTH and isinstance(item, dict | list):
            raise _too_deep(place)
        if nodes > MAX_NODES:
            raise NotationError((), f"should hold at most {MAX_NODES} values")
        if isinstance(item, str):
            _check_encodable(place, item)
        elif isinstance(item, dict):
            for key, inner in item.items():
                _check_encodable(place, key)
                pending.append(((*place, key), inner))
        elif isinstance(item, list):
            pending.extend(((*place, index), inner) for index, inner in enumerate(item))
    return value


def _check_encodable(place: Place, text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotationError(place, "should be text that UTF-8 can encode (no lone surrogates)") from None


def _too_deep(place: Place) -> NotationError:
    return NotationError(place[:MAX_DEPTH], f"should be at most {MAX_DEPTH} levels deep")
