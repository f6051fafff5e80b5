"""Scenario, controls and metadata: hostile text to the core's frozen values, or a DocumentInvalid that says what to
write.

Whatever the bytes are, nothing but DocumentInvalid is raised. Its rows are {path, message}; in a path positions in a
list count from 1, as the run's messages count steps: `steps.2.expect.stdout.jsn` is in the second step.
"""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from service.core.controls import Controls
from service.core.errors import DocumentInvalid
from service.core.scenario import Scenario
from service.intake.complaints import complaints, described, dotted, printable, sentence
from service.intake.notation import NotationError, read_json, read_yaml

MAX_SCENARIO_BYTES = 2 * 2**20
"""A step's stdin alone may be 1 MiB."""
MAX_CONTROLS_BYTES = 256 * 2**10
MAX_METADATA_BYTES = 8 * 2**10
"""As compact JSON: metadata is repeated in every event, and an event stays under 20 kB."""
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 128
MAX_METADATA_VALUE_CHARS = 1024
_METADATA_TEXT_BYTES = 64 * 2**10
"""What is read at all: white space and escapes are longer than what they mean."""

_Model = TypeVar("_Model", bound=BaseModel)


def parse_scenario(data: bytes) -> Scenario:
    """YAML 1.2 (core schema) or JSON, at most 2 MiB. Raises DocumentInvalid("scenario")."""
    return _parsed("scenario", data, Scenario, max_bytes=MAX_SCENARIO_BYTES)


def parse_controls(data: bytes) -> Controls:
    """YAML 1.2 (core schema) or JSON, at most 256 KiB. Raises DocumentInvalid("controls")."""
    return _parsed("controls", data, Controls, max_bytes=MAX_CONTROLS_BYTES)


def parse_metadata(data: bytes) -> dict[str, str]:
    """JSON: at most 16 pairs of text, 8 KiB in all. Raises DocumentInvalid("metadata")."""
    try:
        value = read_json(data, max_bytes=_METADATA_TEXT_BYTES)
    except NotationError as error:
        raise _invalid("metadata", error) from None
    if not isinstance(value, dict):
        row = {"path": "", "message": f"should be a mapping of text to text; found {described(value)}"}
        raise DocumentInvalid("metadata", [row])
    errors = [row for key, text in list(value.items())[: MAX_METADATA_PAIRS + 1] for row in _pair_errors(key, text)]
    if len(value) > MAX_METADATA_PAIRS:
        message = f"should have at most {MAX_METADATA_PAIRS} pairs; it has {len(value)}"
        errors.append({"path": "", "message": message})
    size = len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
    if size > MAX_METADATA_BYTES:
        message = f"should be at most {MAX_METADATA_BYTES} bytes in all; it is {size}"
        errors.append({"path": "", "message": message})
    if errors:
        raise DocumentInvalid("metadata", errors)
    return value


def _pair_errors(key: str, text: Any) -> list[dict[str, str]]:
    path = printable(key)
    if not isinstance(text, str):
        return [{"path": path, "message": f"should be text; found {described(text)}"}]
    rows = []
    if not 0 < len(key) <= MAX_METADATA_KEY_CHARS or not key.isprintable():
        message = f"a key should be 1 to {MAX_METADATA_KEY_CHARS} printable characters"
        rows.append({"path": path, "message": message})
    if len(text) > MAX_METADATA_VALUE_CHARS:
        message = f"should have at most {MAX_METADATA_VALUE_CHARS} characters; it has {len(text)}"
        rows.append({"path": path, "message": message})
    if "\0" in text:
        rows.append({"path": path, "message": "should not contain a NUL character"})
    return rows


def _parsed(document: str, data: bytes, model: type[_Model], *, max_bytes: int) -> _Model:
    try:
        value = read_yaml(data, max_bytes=max_bytes)
    except NotationError as error:
        raise _invalid(document, error) from None
    try:
        return model.model_validate(value, by_alias=True, by_name=False)
    except ValidationError as error:
        raise DocumentInvalid(document, complaints(error, model, value)) from None


def _invalid(document: str, error: NotationError) -> DocumentInvalid:
    return DocumentInvalid(document, [{"path": dotted(error.place), "message": sentence(error.message)}])
