"""/openapi.json says what the routes do, and is a document that tools can read; /docs needs nothing from anywhere."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from service.api.errors import TABLE
from tests.integration.api.conftest import Served

METHODS = {"get", "post", "patch", "delete"}
NEEDS_A_KEY = {"401", "403"}


@pytest.fixture
def document(served: Served) -> dict[str, Any]:
    answer: dict[str, Any] = served.client("nobody").get("/openapi.json").json()
    return answer


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, of_path in document["paths"].items():
        for method, operation in of_path.items():
            yield method, path, operation


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


def test_the_document_is_whole(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"] == "Blastdoor"
    names = document["components"]["schemas"]
    references = set(_references(document))
    assert references
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= set(names)
    ids = [operation["operationId"] for _, _, operation in _operations(document)]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z][A-Za-z]+", name) for name in ids)


def test_every_operation_documents_its_answers_and_its_problems(document: dict[str, Any]) -> None:
    for method, path, operation in _operations(document):
        where = f"{method} {path}"
        assert method in METHODS, where
        assert operation["summary"], where
        declared = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert declared == set(re.findall(r"{(\w+)}", path)), where
        codes: set[str] = set()
        for status, answer in operation["responses"].items():
            assert answer["description"], (where, status)
            assert "X-Request-ID" in answer["headers"], (where, status)
            content = answer.get("content", {})
            if int(status) >= 400:
                problem = content["application/problem+json"]
                assert problem["schema"] == {"$ref": "#/components/schemas/Problem"}
                assert {TABLE[code].status for code in problem["examples"]} == {int(status)}
                codes |= set(problem["examples"])
            elif status != "204":
                (kind,) = content
                assert kind in (
                    "application/json",
                    "application/octet-stream",
                    "application/xml",
                    "text/event-stream",
                ), (where, status)
                assert content[kind]["schema"], (where, status)
        if path.startswith("/v1/"):
            assert operation["security"] == [{"key": []}], where
            assert {"unauthenticated", "forbidden", "unavailable", "internal"} <= codes, where
        else:
            assert "security" not in operation, where


def test_the_upload_is_described_though_no_framework_parses_it(document: dict[str, Any]) -> None:
    operation = document["paths"]["/v1/runs"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"bundle", "scenario", "controls", "metadata"}
    assert {"Location", "Idempotent-Replayed"} <= set(operation["responses"]["202"]["headers"])
    assert {"Idempotency-Key", "Blastdoor-Tenant"} <= {each["name"] for each in operation["parameters"]}


def test_the_contracts_fields_are_those_of_the_document(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    run = schemas["Run"]["properties"]
    assert list(run) == [
        "id", "tenant", "metadata", "scenario", "bundle", "controls", "phase", "outcome", "reason", "message",
        "attempt", "queue_position", "queue_reason", "created_at", "started_at", "finished_at",
        "boundary_destroyed_at", "placement", "steps", "usage", "artifacts", "skipped_artifacts", "evidence",
    ]  # fmt: skip
    shown = schemas["CapabilitiesShown"]["properties"]
    assert set(shown) == {"boundaries", "runtimes", "limits", "quota"}


def test_capabilities_show_every_boundary_and_why_one_is_not_there(served: Served) -> None:
    shown = served.client("acme").get("/v1/capabilities").json()

    rows = {row["boundary"]: row for row in shown["boundaries"]}
    assert len(rows) == 8
    assert rows["gvisor"]["available"] is True
    assert rows["gvisor"]["missing"] == []
    assert rows["gvisor"]["guarantees"] == {"kernel": "sandboxed", "nodes": "shared", "control_plane": "isolated"}
    assert rows["gvisor"]["versions"] == {"runsc": "20260101.0"}
    assert rows["microvm"]["available"] is False
    assert rows["microvm"]["missing"] == ["no live worker offers microvm"]
    assert shown["runtimes"] == [{"name": "default", "digest": "sha256:" + "d" * 64}]
    assert shown["quota"] == {"concurrent": 2, "queued": 100, "storage_bytes": 2**30}
    assert shown["limits"]["platform"]["wall"] == "900s"
    assert shown["limits"]["defaults"]["memory"] == 256 * 2**20


def test_the_page_for_people_loads_nothing_from_anywhere(served: Served, document: dict[str, Any]) -> None:
    page = served.client("nobody").get("/docs")

    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text
    assert not re.search(r"(src|href)=.?(https?:)?//", page.text)
    for _, path, _ in _operations(document):
        assert path in page.text
