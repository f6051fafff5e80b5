"""/openapi.json and /docs. Made from the routes once; what FastAPI cannot know is put in here.

/docs is a plain listing without script: FastAPI's own page loads its script from somebody else's server, and this page
must work where there is no such server, under a policy that allows none.
"""

import base64
import hashlib
import html
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.api.errors import MEDIA_TYPE, TABLE, TYPE_PREFIX, Problem

COMPONENTS = "#/components/schemas/"
REQUEST_ID = {"X-Request-ID": {"description": "also in problems and in our log", "schema": {"type": "string"}}}
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}"
    "code{background:#8882;padding:.1em .3em;border-radius:3px}summary{cursor:pointer;margin:.4em 0}"
    "table{border-collapse:collapse}td{border-top:1px solid #8884;padding:.2em .8em .2em 0;vertical-align:top}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
PAGE_POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; frame-ancestors 'none'"
_EVERYWHERE = ("unavailable", "internal")

Responses = dict[int | str, dict[str, Any]]


def problems(*codes: str) -> Responses:
    """The `responses=` of a route: its problems by status, each code with an example."""
    by_status: Responses = {}
    for code in (*codes, *_EVERYWHERE):
        kind = TABLE[code]
        entry = by_status.setdefault(
            kind.status,
            {"description": "", "content": {MEDIA_TYPE: {"schema": {"$ref": COMPONENTS + "Problem"}, "examples": {}}}},
        )
        entry["description"] += f"{'; ' if entry['description'] else ''}{kind.title} (`{code}`)"
        entry["content"][MEDIA_TYPE]["examples"][code] = {"value": _example(code)}
        headers = dict.fromkeys(kind.headers, "") | ({"Retry-After": "seconds"} if code == "unavailable" else {})
        for name, description in headers.items():
            header = {"description": description, "schema": {"type": "string"}}
            entry.setdefault("headers", {})[name] = header
    return by_status


def _example(code: str) -> dict[str, Any]:
    kind = TABLE[code]
    example: dict[str, Any] = {
        "type": TYPE_PREFIX + code, "title": kind.title, "status": kind.status, "detail": "what was wrong, in words",
        "instance": "/v1/runs", "code": code, "request_id": "req_0192b7c0aa1e7cc59f20c1d2e3f4a5b6",
    }  # fmt: skip
    if code.endswith("_invalid"):
        example["errors"] = [{"path": "steps.0.run", "message": "Field required"}]
    return example


def openapi(app: FastAPI) -> Mapping[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes,
            tags=app.openapi_tags, separate_input_output_schemas=False,
        )  # fmt: skip
        _, shared = models_json_schema([(Problem, "serialization")], ref_template=COMPONENTS + "{model}")
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(shared["$defs"])
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for operation in _operations(document):
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]  # FastAPI's guess where a parameter is any text
            for response in operation["responses"].values():
                response["headers"] = REQUEST_ID | response.get("headers", {})
        app.openapi_schema = document
    return app.openapi_schema


def _operations(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [operation for path in document["paths"].values() for operation in path.values()]


def page(document: Mapping[str, Any]) -> str:
    """Every operation of the document on one page of HTML."""
    rows = [
        _row(method, path, operation)
        for path, of_path in document["paths"].items()
        for method, operation in of_path.items()
    ]
    title = html.escape(document["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title} {html.escape(document['info']['version'])}</h1>"
        f"<p>{html.escape(document['info']['description'])}</p>"
        '<p>For tools: <a href="/openapi.json">/openapi.json</a></p>' + "".join(rows)
    )


def _row(method: str, path: str, operation: Mapping[str, Any]) -> str:
    answers = "".join(
        f"<tr><td><code>{html.escape(status)}</code><td>{html.escape(answer['description'])}"
        for status, answer in operation["responses"].items()
    )
    asked = "".join(
        f"<tr><td><code>{html.escape(each['name'])}</code>"
        f"<td>{html.escape(each['in'])}: {html.escape(each.get('description', ''))}"
        for each in operation.get("parameters", [])
    )
    return (
        f"<details><summary><code>{method.upper()} {html.escape(path)}</code> "
        f"{html.escape(operation['summary'])}</summary>"
        f"<p>{html.escape(operation.get('description', ''))}</p><table>{asked}</table><h4>Answers</h4>"
        f"<table>{answers}</table></details>"
    )
