"""Whatever an OpenAPI document allows and forbids, asked of a running service: what it answers must be in the document,
and never a failure of ours.

The requests are schemathesis': for each operation its boundary values (the coverage phase), then random ones, both such
as the document allows and such as it does not. What would be guessed in no lifetime (an id of a run that exists, a key)
is put in from outside. Everything is derived from the document alone, so the same document gives the same requests.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation, Case
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
ANSWERED_WITHIN_S = 30.0
_NOTHING_TO_ASK: Mapping[GenerationMode, tuple[type[Exception], ...]] = {
    GenerationMode.POSITIVE: (),
    GenerationMode.NEGATIVE: (Unsatisfiable,),  # an operation without parameters and body forbids nothing
}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who asks: headers that are sent, and headers of the document that are not to be made up."""

    headers: Mapping[str, str]
    left_out: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Target:
    """`identities`: who may ask this operation, by its path. `known`: by operation, values of path parameters that
    exist; they stand in for what was generated two times of three."""

    url: str
    document: Mapping[str, Any]
    identities: Callable[[str], Sequence[Identity]]
    known: Callable[[str, str], Mapping[str, Sequence[str]]]


@dataclass
class Report:
    """`findings`: for each operation that has some, the first of each kind. `statuses`: answers by operation."""

    findings: dict[str, dict[str, str]] = field(default_factory=dict)
    statuses: dict[str, Counter[int]] = field(default_factory=dict)

    def found(self, operation: str, kind: str, what: str) -> None:
        self.findings.setdefault(operation, {}).setdefault(kind, what)

    def __str__(self) -> str:
        rows = [
            f"=== {operation}\n{kind}: {what}"
            for operation, kinds in self.findings.items()
            for kind, what in kinds.items()
        ]
        return "\n".join(rows) or "nothing found"


def ask_everything(target: Target, *, examples: int) -> Report:
    """`examples`: random requests for each operation and mode, beside its boundary values."""
    schema = schemathesis.openapi.from_dict(dict(target.document))
    report = Report()
    with requests.Session() as session:
        session.trust_env = False
        for operation in sorted((found.ok() for found in schema.get_all_operations()), key=_gentle_first):
            _ask(_Asker(target, session, report, operation), operation, examples=examples)
    return report


def _gentle_first(operation: APIOperation) -> tuple[int, int]:
    """What takes away comes last, or there would be nothing left to ask about: who asks after what they have, and a
    part before the whole."""
    word = f"{operation.method} {operation.path}".lower()
    takes = ["purge" in word, "cleanup" in word, "sites" in word].count(True) + 2 * word.startswith("delete")
    return takes + ("tenants" in word and takes > 0), -word.count("/") if takes else 0


def _ask(asker: "_Asker", operation: APIOperation, *, examples: int) -> None:
    generation = operation.schema.config.generation_for(operation=operation, phase="coverage")
    for case in operation.schema.iter_coverage_cases(operation, generation_modes=MODES, generation_config=generation):
        if case.method.upper() == operation.method.upper():
            asker.ask(case)
    quiet = settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for mode in MODES:

        @quiet
        @given(case=operation.as_strategy(generation_mode=mode), number=st.integers(0, 2**16))
        def ask(case: Case, number: int) -> None:
            asker.ask(case)

        with suppress(*_NOTHING_TO_ASK[mode]):
            ask()


class _Asker:
    """Asks one operation, each time as the next identity and about the next known thing."""

    def __init__(self, target: Target, session: requests.Session, report: Report, operation: APIOperation) -> None:
        self._target, self._session, self._report = target, session, report
        self._label = f"{operation.method.upper()} {operation.path}"
        self._identities = itertools.cycle(target.identities(operation.path))
        self._known = self._in_turns(target.known(operation.method.upper(), operation.path))
        report.statuses[self._label] = Counter()

    def ask(self, case: Case) -> None:
        identity = next(self._identities)
        for name in [name for name in case.headers if name.lower() in identity.left_out]:
            del case.headers[name]
        case.headers.update(identity.headers)
        for name, value in next(self._known).items():
            if name in case.path_parameters:
                case.path_parameters[name] = value
        try:
            answer = case.call(base_url=self._target.url, session=self._session, timeout=ANSWERED_WITHIN_S)
        except (requests.RequestException, UnicodeError, ValueError) as error:
            if not _never_sent(error):
                self._report.found(self._label, type(error).__name__, f"{error}\n{case.as_curl_command()}")
            return
        self._report.statuses[self._label][answer.status_code] += 1
        try:
            case.validate_response(answer, checks=CHECKS)
        except FailureGroup as failures:
            for failure in failures.exceptions:
                kind = type(failure).__name__
                what = f"{failure}\n{answer.status_code} {answer.text[:500]}\n{case.as_curl_command()}"
                self._report.found(self._label, f"{kind} {answer.status_code}", what)

    @staticmethod
    def _in_turns(known: Mapping[str, Sequence[str]]) -> Iterator[Mapping[str, str]]:
        for turn in itertools.count():
            yield {name: values[turn % len(values)] for name, values in known.items()}
            yield {name: values[-turn % len(values)] for name, values in known.items()}
            yield {}


def _never_sent(error: Exception) -> bool:
    """The client itself refuses: a header with a line break, a URL that is none."""
    return isinstance(error, requests.exceptions.InvalidHeader | requests.exceptions.InvalidURL | UnicodeError)
