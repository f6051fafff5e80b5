"""What the customer wants played: ordered steps and what must be true of each. Strict: an unknown key is an error."""

import hashlib
import json
import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    model_validator,
)

from service.core.patterns import checked_pattern
from service.core.quantities import Duration

MAX_STEPS = 100
MAX_ENV_BYTES = 64 * 1024
MAX_STDIN_BYTES = 1024 * 1024
_ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,127}$", re.ASCII)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("should not contain a NUL character")
    return value


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("should be text that UTF-8 can encode (no lone surrogates)") from error
    return value


Text = Annotated[StrictStr, AfterValidator(_encodable)]
Argument = Annotated[StrictStr, AfterValidator(_encodable), AfterValidator(_no_nul), Field(max_length=128 * 1024)]


def _env(value: Any) -> Any:
    """Whole numbers are taken as their digits, since `PORT: 8080` is what people write; true, 1.0 and null are not."""
    if not isinstance(value, dict):
        return value
    out: dict[Any, Any] = {}
    for name, text in value.items():
        if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
            raise ValueError(f"{name!r} should be a variable name: letters, digits and _, not starting with a digit")
        out[name] = str(text) if isinstance(text, int) and not isinstance(text, bool) else text
        if not isinstance(out[name], str):
            raise ValueError(f"{name} should be text; put the value in quotes")
    if sum(len(k) + len(v.encode("utf-8", "surrogatepass")) + 2 for k, v in out.items()) > MAX_ENV_BYTES:
        raise ValueError(f"should be at most {MAX_ENV_BYTES} bytes in all")
    return out


Env = Annotated[dict[Argument, Argument], BeforeValidator(_env)]


def printable(value: str) -> str:
    """Names reach terminals, JUnit and every database: no control, format or separator characters but the space."""
    for char in value:
        if not char.isprintable():
            raise ValueError(f"should be printable text on one line; {char!a} is not")
    return value


def relative_path(value: str) -> str:
    """A path or pattern beneath /work: no leading slash, no `..`, no empty part, at most 1024 bytes."""
    parts = value.split("/")
    if value.startswith("/") or ".." in parts or "" in parts or "." in parts or "\0" in value:
        raise ValueError("should be a path relative to the working directory, without '..', '.' or empty parts")
    if len(value.encode()) > 1024 or len(parts) > 32:
        raise ValueError("should be at most 1024 bytes and 32 parts long")
    return value


RelativePath = Annotated[Text, AfterValidator(printable), AfterValidator(relative_path)]
Name = Annotated[Text, AfterValidator(printable), Field(min_length=1, max_length=200)]


class TextExpectation(_Document):
    """What must be true of some bytes. Every key that is given must hold; `json` is a subset match."""

    equals: Text | None = None
    contains: Text | None = None
    matches: Annotated[Text, Field(max_length=4096), AfterValidator(checked_pattern)] | None = None
    json_: Any = Field(default=None, alias="json")

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    @property
    def given(self) -> frozenset[str]:
        """The keys the author wrote: `json: null` is an expectation, an absent `json` is none."""
        return frozenset(name.rstrip("_") for name in self.model_fields_set)


class FileExpectation(TextExpectation):
    exists: StrictBool | None = None

    @model_validator(mode="after")
    def _absent_has_no_content(self) -> "FileExpectation":
        if self.exists is False and self.given - {"exists"}:
            raise ValueError("a file that must not exist cannot have expectations of its content")
        return self


class Expect(_Document):
    """`exit_code` is 0 when absent; `exit_code: null` accepts any end, a signal too."""

    exit_code: Annotated[int, Field(ge=0, le=255, strict=True)] | None = 0
    stdout: TextExpectation | None = None
    stderr: TextExpectation | None = None
    files: Annotated[dict[RelativePath, FileExpectation], Field(max_length=100)] = {}
    max_seconds: Annotated[float, Field(gt=0, le=900, strict=True)] | None = None


class Step(_Document):
    name: Name
    run: Annotated[Argument, Field(min_length=1)] | Annotated[list[Argument], Field(min_length=1, max_length=1024)]
    timeout: Duration | None = None
    stdin: Annotated[Text, Field(max_length=MAX_STDIN_BYTES)] = ""
    env: Env = {}
    expect: Expect = Expect()
    always: StrictBool = False
    continue_on_failure: StrictBool = False

    @model_validator(mode="after")
    def _program_named(self) -> "Step":
        if isinstance(self.run, list) and not self.run[0]:
            raise ValueError("run: the first word should name a program")
        return self

    @property
    def argv(self) -> tuple[str, ...]:
        """A string is for `sh -c`, a list is the argument vector as it stands."""
        return ("/bin/sh", "-c", self.run) if isinstance(self.run, str) else tuple(self.run)


class Scenario(_Document):
    name: Name
    runtime: Annotated[StrictStr, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")] = "default"
    env: Env = {}
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=MAX_STEPS)]
    artifacts: Annotated[tuple[RelativePath, ...], Field(max_length=100)] = ()

    @property
    def digest(self) -> str:
        """Of the meaning, not of the spelling: YAML and JSON of the same scenario agree."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True, exclude_unset=True), sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def environment(self, step: Step) -> dict[str, str]:
        """Exactly what the step's process sees: the four documented names, then the scenario's, then the step's."""
        base = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/work"}
        return base | {"LANG": "C.UTF-8", "TMPDIR": "/tmp"} | self.env | step.env  # noqa: S108 - the guest's own /tmp
