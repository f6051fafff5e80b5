"""The one table from errors to problem+json (RFC 9457). Logic raises core errors; HTTP's numbers are here.

What belongs to another tenant and what never was are one document; only `instance` and `request_id` differ.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from service.core.errors import BlastdoorError, DocumentInvalid, NotFound, Unavailable

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:blastdoor:problem:"
_MAX_ROWS = 50
_MAX_PATH = 200

log = structlog.get_logger()


@dataclass(frozen=True)
class Kind:
    """What a code means on the wire. `headers` go with every such answer."""

    status: int
    title: str
    headers: Mapping[str, str] = field(default_factory=dict)


TABLE: Mapping[str, Kind] = {
    "request_invalid": Kind(422, "The request is not valid"),
    "scenario_invalid": Kind(422, "The scenario is not valid"),
    "controls_invalid": Kind(422, "The controls are not valid"),
    "metadata_invalid": Kind(422, "The metadata are not valid"),
    "bundle_rejected": Kind(422, "The bundle is not accepted"),
    "placement_refused": Kind(422, "No boundary gives what this run requires"),
    "idempotency_mismatch": Kind(422, "The idempotency key was used for other content"),
    "idempotency_in_flight": Kind(409, "The first request with this idempotency key is still in flight"),
    "too_large": Kind(413, "The request is too large"),
    "upload_timed_out": Kind(408, "The request took too long to arrive", {"Connection": "close"}),
    "quota_exceeded": Kind(429, "The tenant's quota is used up"),
    "storage_full": Kind(507, "The platform has no room"),
    "unavailable": Kind(503, "Not available now"),
    "not_found": Kind(404, "Not found"),
    "method_not_allowed": Kind(405, "This method is not allowed here"),
    "site_alive": Kind(409, "The site has answered lately"),
    "plan_not_forced": Kind(409, "The plan was made without force"),
    "not_finished": Kind(409, "The run is not finished"),
    "tenant_exists": Kind(409, "The tenant's name is taken"),
    "service_exists": Kind(409, "The service's name is taken"),
    "webhook_disabled": Kind(409, "The webhook is disabled"),
    "conflict": Kind(409, "In conflict with what exists"),
    "unauthenticated": Kind(401, "A valid key is required", {"WWW-Authenticate": 'Bearer realm="blastdoor"'}),
    "forbidden": Kind(403, "This key may not do that"),
    "not_configured": Kind(501, "The operator has not set up what this needs"),
    "internal": Kind(500, "Something went wrong on our side"),
}
_BY_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 401: "unauthenticated", 403: "forbidden"}


class ErrorRow(BaseModel):
    path: str = Field(description="dotted path of what is wrong, empty for the whole")
    message: str


class Problem(BaseModel):
    """RFC 9457. Further members go with some codes: `rule` and `member` with bundle_rejected, `requirements`,
    `candidates` and `why` with placement_refused."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=[TYPE_PREFIX + "not_found"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="path of the request")
    code: str = Field(description="stable word to act on", json_schema_extra={"enum": list(TABLE)})
    request_id: str
    errors: list[ErrorRow] | None = Field(None, description="with ..._invalid: each place that is wrong")


def problem_response(
    scope: Scope, *, code: str, detail: str, extra: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:  # fmt: skip
    """The answer for one of the table's codes. `extra` members never displace the fixed ones."""
    kind = TABLE[code]
    document = dict(extra or {}) | {
        "type": TYPE_PREFIX + code,
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "instance": scope["path"],
        "code": code,
        "request_id": scope.get("state", {}).get("request_id", ""),
    }
    body = json.dumps(document, separators=(",", ":"), default=str).encode()
    return Response(body, kind.status, {**kind.headers, **(headers or {})}, MEDIA_TYPE)


def error_response(scope: Scope, *, error: BlastdoorError) -> Response:
    """An error that the table has no row for is ours: logged with its trace, and told to nobody."""
    if error.code not in TABLE or error.code == "internal":
        return internal_error(scope, error=error)
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Unavailable) else {}
    return problem_response(scope, code=error.code, detail=error.detail, extra=error.extra, headers=headers)


def code_of(error: BaseException) -> str:
    """The word for it in the table; `gone` when the client hung up."""
    if isinstance(error, ClientDisconnect | asyncio.CancelledError):
        return "gone"
    return error.code if isinstance(error, BlastdoorError) and error.code in TABLE else "internal"


def internal_error(scope: Scope, *, error: BaseException) -> Response:
    log.error("request_failed", method=scope.get("method"), path=scope.get("path"), exc_info=error)
    return problem_response(scope, code="internal", detail="the request failed; the log has it under this request_id")


def install(app: FastAPI) -> None:
    app.add_exception_handler(BlastdoorError, _blastdoor)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)


async def _blastdoor(request: Request, error: Exception) -> Response:
    assert isinstance(error, BlastdoorError)
    return error_response(request.scope, error=error)


async def _validation(request: Request, error: Exception) -> Response:
    """FastAPI's own words, without the input that they quote: it may hold a secret."""
    assert isinstance(error, RequestValidationError)
    rows = [{"path": _path(row["loc"]), "message": str(row["msg"])} for row in error.errors()[:_MAX_ROWS]]
    return error_response(request.scope, error=DocumentInvalid("request", rows))


def _path(location: tuple[str | int, ...]) -> str:
    """`("body", "quota", "queued")` is `quota.queued`; what is not in the body says where it is: `query.wait`."""
    words = [str(word) for word in location]
    if words[:1] == ["body"]:
        words = words[1:]
    return ".".join(words)[:_MAX_PATH]


async def _http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown routes, methods, bodies that cannot be parsed."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(request.scope, error=NotFound())
    if code := _BY_STATUS.get(error.status_code):
        return problem_response(request.scope, code=code, detail=TABLE[code].title.lower(), headers=error.headers)
    if error.status_code < 500:
        row = {"path": "", "message": "the body cannot be read"}
        return error_response(request.scope, error=DocumentInvalid("request", [row]))
    return internal_error(request.scope, error=error)


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody is there to read it; the connection wants an end all the same."""
    return problem_response(request.scope, code="upload_timed_out", detail="the client hung up")
