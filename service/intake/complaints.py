"""Pydantic's errors as sentences for the author of a document: where it is, what is there, and what would be right.

A path is dotted, and a position in a list counts from 1, as the run's own messages count steps:
`steps.2.expect.stdout.jsn` is the second step's. Of the author's own text at most 100 characters are repeated, with
whatever is not printable escaped.
"""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from service.core.quantities import format_size

MAX_ROWS = 50
_ECHO_CHARS = 100
_MESSAGE_CHARS = 400
_SIZES = frozenset({"memory", "disk", "output", "artifacts"})
_PATTERNS = {
    "runtime": "should be a runtime's name: small letters, digits, '.', '_' and '-', at most 63 characters",
    "allow": "should be HOST:PORT in small letters, such as api.example.com:443",
}
_KINDS = {
    "string_type": "should be text", "bool_type": "should be true or false", "bool_parsing": "should be true or false",
    "int_type": "should be a whole number", "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number", "int_parsing_size": "should be a smaller whole number",
    "float_type": "should be a number", "float_parsing": "should be a number", "finite_number": "should be finite",
    "list_type": "should be a list", "tuple_type": "should be a list", "dict_type": "should be a mapping",
    "model_type": "should be a mapping", "model_attributes_type": "should be a mapping",
}  # fmt: skip
_COMPARISONS = {
    "greater_than": ("above", "gt"), "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"), "less_than_equal": ("at most", "le"),
}  # fmt: skip


def dotted(place: Sequence[str | int]) -> str:
    """`("steps", 1, "name")` -> `steps.2.name`."""
    return ".".join(str(part + 1) if isinstance(part, int) else printable(part) for part in place)


def printable(text: str, *, most: int = _ECHO_CHARS) -> str:
    """Cut, and every character that is not plainly printable escaped."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in cut)


def sentence(text: str) -> str:
    """A message of our own, which may quote the author: its end, which says what would be right, is kept when it is
    cut."""
    if len(text) > _MESSAGE_CHARS:
        text = text[:_ECHO_CHARS] + " [...] " + text[-200:]
    return printable(text, most=_MESSAGE_CHARS)


@dataclass(frozen=True)
class _Spot:
    """Where an error is. `model`: the mapping that holds the last part of the place, when it is one of ours. `choice`:
    how deep in the place there is a choice between types, and pydantic's word for the branch that the error is
    from."""

    place: tuple[str | int, ...]
    model: type[BaseModel] | None
    choice: tuple[int, str] | None


def complaints(error: ValidationError, model: type[BaseModel], value: Any) -> list[dict[str, str]]:
    """One row {path, message} for each place that is wrong, at most MAX_ROWS."""
    rows: dict[tuple[str, str], None] = {}
    for found in error.errors(include_url=False):
        spot = _spot(found["loc"], model)
        if _is_of_the_branch_taken(spot, value) and not _follows_from_others(found):
            rows[dotted(spot.place), sentence(_message(found, spot))] = None
    out = [{"path": path, "message": message} for path, message in rows]
    if len(out) > MAX_ROWS:
        more = len(out) - MAX_ROWS + 1
        out = [*out[: MAX_ROWS - 1], {"path": "", "message": f"and {more} more places that are wrong"}]
    return out


def _spot(loc: Sequence[str | int], model: type[BaseModel]) -> _Spot:
    """Pydantic's location without its inner marks."""
    place: list[str | int] = []
    wanted: Any = model
    holder: type[BaseModel] | None = None
    choice: tuple[int, str] | None = None
    for part in loc:
        wanted = _bare(wanted)
        arguments = get_args(wanted)
        if get_origin(wanted) in (Union, types.UnionType):
            is_list = str(part).startswith("list[")
            choice = (len(place), "list" if is_list else "text")
            wanted = next((a for a in arguments if (get_origin(_bare(a)) is list) is is_list), None)
            continue
        if part == "[key]":
            continue
        place.append(part)
        holder = wanted if isinstance(wanted, type) and issubclass(wanted, BaseModel) else None
        if holder is not None:
            wanted = {f.alias or name: f.annotation for name, f in holder.model_fields.items()}.get(str(part))
        elif get_origin(wanted) is dict and len(arguments) == 2:
            wanted = arguments[1]
        else:
            wanted = arguments[0] if get_origin(wanted) in (list, tuple) and arguments else None
    return _Spot(tuple(place), holder, choice)


def _bare(annotation: Any) -> Any:
    """Without Annotated, and without `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        if len(rest) == 1:
            return _bare(rest[0])
    return annotation


def _is_of_the_branch_taken(spot: _Spot, value: Any) -> bool:
    """Of a choice between text and a list only what concerns the one that the author wrote is told."""
    if spot.choice is None:
        return True
    depth, branch = spot.choice
    written = _value_at(value, spot.place[:depth])
    if isinstance(written, str | list):
        return isinstance(written, list) is (branch == "list")
    return True


def _follows_from_others(found: Mapping[str, Any]) -> bool:
    """A list is called too short when its elements were wrong, and left out for that."""
    written = found["input"]
    return found["type"] == "too_short" and isinstance(written, list) and len(written) >= found["ctx"]["min_length"]


def _value_at(value: Any, place: Sequence[str | int]) -> Any:
    for part in place:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _message(found: Mapping[str, Any], spot: _Spot) -> str:
    kind, context, written = found["type"], found.get("ctx", {}), found["input"]
    last = spot.place[-1] if spot.place else ""
    if spot.choice is not None and spot.choice[0] == len(spot.place) and kind in _KINDS:
        return f"should be text (for sh -c) or a list of arguments; found {described(written)}"
    if kind in _KINDS:
        quotes = "; put it in quotes" if kind == "string_type" and isinstance(written, bool | int | float) else ""
        return f"{_KINDS[kind]}; found {described(written)}{quotes}"
    if kind in _COMPARISONS:
        word, key = _COMPARISONS[kind]
        bound = format_size(context[key]) if last in _SIZES else str(context[key])
        return f"should be {word} {bound}; found {described(written)}"
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        return _unknown_key(spot.model, str(last))
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        return _length(kind, context, written)
    if kind in ("enum", "literal_error"):
        return f"should be {context['expected']}; found {described(written)}"
    if kind == "string_pattern_mismatch":
        named = [part for part in spot.place if isinstance(part, str)]
        wanted = _PATTERNS.get(named[-1] if named else "", f"should match {context['pattern']}")
        return f"{wanted}; found {described(written)}"
    if kind == "value_error":
        return str(context.get("error", "is not valid"))
    return f"is not valid; found {described(written)}"


def _unknown_key(holder: type[BaseModel] | None, key: str) -> str:
    known = sorted(f.alias or name for name, f in holder.model_fields.items()) if holder else []
    near = difflib.get_close_matches(key[:_ECHO_CHARS], known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key{hint} (known keys: {', '.join(known)})"


def _length(kind: str, context: Mapping[str, Any], written: Any) -> str:
    unit = "character" if isinstance(written, str) else "entry" if isinstance(written, dict) else "element"
    most = kind.endswith("too_long")
    bound = context["max_length" if most else "min_length"]
    plural = unit if bound == 1 else "entries" if unit == "entry" else f"{unit}s"
    has = f"; it has {len(written)}" if isinstance(written, str | list | dict) else ""
    return f"should have at {'most' if most else 'least'} {bound} {plural}{has}"


def described(value: Any) -> str:
    """A value of the document in few words."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text '{printable(value)}'"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"a mapping of {len(value)}"
    return "something else"
