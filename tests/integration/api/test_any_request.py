"""Every operation of /openapi.json, asked all that the document allows and forbids: no 5xx, not one; a 503 with its
Retry-After counts as well, since nothing is missing here. BLASTDOOR_TEST_REQUESTS=500 digs deeper."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import Response

from service.core.canary import CANARY_TENANT, SCENARIO
from service.core.ids import new_run_id
from service.intake.multipart import Upload
from service.settings import Settings
from service.usecases.canary import enrol
from service.usecases.submit import submit
from tests.any_request import Identity, Report, Target, ask_everything
from tests.integration.api.conftest import Served, make_settings
from tests.integration.api.test_cleanup import SITE, Platform, ask, away, planned
from tests.integration.api.test_webhooks import EXCEPTED, URL, create, fail_all
from tests.servers import RedisServer

EXAMPLES = int(os.environ.get("BLASTDOOR_TEST_REQUESTS", "5"))
FINISHED_ONLY = ("GET",)
"""A run that waits would hold `wait` and a stream of events for as long as they ask."""
NOT_IN_VAIN = {
    "POST /v1/runs", "GET /v1/runs", "GET /v1/runs/{run_id}", "GET /v1/runs/{run_id}/events",
    "POST /v1/runs/{run_id}/cancel", "GET /v1/capabilities", "GET /v1/runs/{run_id}/steps/{n}/stdout",
    "POST /v1/tenants", "PATCH /v1/tenants/{name}", "POST /v1/admin/services", "PATCH /v1/admin/tenants/{name}",
    "POST /v1/admin/tenants/{name}/keys", "DELETE /v1/tenants/{name}", "DELETE /v1/tenants/{name}/keys/{key_id}",
    "DELETE /v1/admin/tenants/{name}/keys/{key_id}", "GET /v1/webhooks/{webhook_id}",
    "POST /v1/webhooks/{webhook_id}/rotate", "DELETE /v1/webhooks/{webhook_id}",
    "GET /v1/webhooks/{webhook_id}/deliveries", "POST /v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay",
    "POST /v1/admin/dead-letters/{delivery_id}/replay", "GET /v1/admin/cleanup/{plan_id}", "POST /v1/admin/cleanup",
    "DELETE /v1/admin/sites/{site}", "GET /v1/admin/boundaries", "POST /v1/admin/runs/{run_id}/kill",
}  # fmt: skip
pytestmark = pytest.mark.timeout(300 if EXAMPLES <= 10 else 7200)


@pytest.fixture
def settings(tmp_path: Path, sqlite_database: str, redis_server: RedisServer) -> Settings:
    """The one worker is a row that nobody renews, and one canary run has to last: fresh for as long as it is dug."""
    return make_settings(
        tmp_path, sqlite_database, redis_server.url, worker_fresh_s=86400.0, canary_s=86400.0, webhook_allow=EXCEPTED
    )


def target_of(served: Served) -> Target:
    """With a finished run, a queued one, another tenant's and one that never was; tenants that may come to harm; two
    webhooks whose deliveries failed; a plan of clean-up; a site that fell silent."""
    ids = _with_webhooks(served) | _with_a_silent_site(served)
    finished, theirs = served.submit()["id"], served.submit("globex")["id"]
    served.play()
    served.play()
    enrol(served.app.state.context.submitting)
    submit(served.app.state.context.submitting, tenant=CANARY_TENANT, upload=Upload(scenario=SCENARIO))
    served.play()
    queued = served.submit()["id"]
    served.client("operator").post("/v1/admin/tenants", json={"name": "victim"}).raise_for_status()
    served.client("shop").post("/v1/tenants", json={"name": "stall"}).raise_for_status()
    victims_keys = [_key(served, "operator", f"/v1/admin/tenants/{name}/keys") for name in ("victim", "acme")]
    stalls_keys = [_key(served, "shop", "/v1/tenants/stall/keys")]

    def identities(path: str) -> Sequence[Identity]:
        def bearer(who: str, **more: str) -> Identity:
            left_out = frozenset({"authorization", *(name.lower() for name in more)})
            return Identity(headers={"Authorization": f"Bearer {served.keys[who]}", **more}, left_out=left_out)

        if path.startswith("/v1/admin"):
            return [bearer("operator")]
        if path.startswith("/v1/tenants"):
            return [bearer("shop")]
        if not path.startswith("/v1"):
            return [Identity(headers={})]
        own = bearer("acme")
        without = Identity(headers=own.headers, left_out=own.left_out | {"blastdoor-tenant"})
        return [without, without, bearer("shop", **{"Blastdoor-Tenant": "corner"}), own, bearer("shop")]

    def known(method: str, path: str) -> Mapping[str, Sequence[str]]:
        runs = [finished, theirs, new_run_id()] if method in FINISHED_ONLY else [finished, queued, theirs, new_run_id()]
        admin = "admin" in path
        return ids | {
            "run_id": runs, "n": ["1", "2"], "name": ["victim", "acme"] if admin else ["stall"],
            "key_id": victims_keys if admin else stalls_keys, "delivery_id": ids["dead" if admin else "delivery_id"],
        }  # fmt: skip

    document = served.client("nobody").get("/openapi.json").json()
    return Target(url=served.url, document=document, identities=identities, known=known)


def _key(served: Served, who: str, path: str) -> str:
    answer = served.client(who).post(path)
    answer.raise_for_status()
    return str(answer.json()["id"])


def _with_webhooks(served: Served) -> dict[str, Sequence[str]]:
    """A tenant's and another's, each with one delivery that was given up: the first is for its owner to send again, the
    second for the operator."""
    owners = ("acme", "globex")
    made = [create(served, who, url=URL)["id"] for who in owners]
    for who in owners:
        served.submit(who)
    dead = [fail_all(served, id_)[0] for id_ in made]
    for _ in owners:
        served.play()
    return {"webhook_id": made[:1], "delivery_id": dead[:1], "dead": dead[1:]}


def _with_a_silent_site(served: Served) -> dict[str, Sequence[str]]:
    platform = Platform(served)
    platform.build()
    platform.reaper.look()
    away(served, SITE)
    return {"site": [SITE], "plan_id": [planned(ask(served, {"orphans": True}))["id"]]}


def succeeded(report: Report) -> set[str]:
    return {name for name, statuses in report.statuses.items() if any(200 <= status < 300 for status in statuses)}


def test_no_request_that_can_be_made_up_is_answered_outside_the_contract(served: Served) -> None:
    target = target_of(served)
    report = ask_everything(target, examples=EXAMPLES)
    assert report.findings == {}, str(report)
    assert set(report.statuses) == {
        f"{method.upper()} {path}" for path, methods in target.document["paths"].items() for method in methods
    }
    assert succeeded(report) >= NOT_IN_VAIN, "too little of what was asked got past the door"


def test_control_a_route_that_fails_and_one_that_answers_otherwise_are_found(served: Served) -> None:
    @served.app.get("/v1/planted/failing")
    async def failing(number: int = 0) -> dict[str, int]:
        return {"number": 1 // max(0, 1000 - abs(number))}

    @served.app.get("/v1/planted/away")
    async def away() -> Response:
        return Response(status_code=503, headers={"Retry-After": "1"})

    @served.app.get("/v1/planted/other")
    async def other() -> Response:
        return Response(b'{"number": "one"}', media_type="application/json")

    number = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
    answers = {"200": {"description": "", "content": {"application/json": {"schema": number}}}}
    refused = {"422": {"description": ""}, "503": {"description": ""}, "500": {"description": ""}}
    asked = [{"name": "number", "in": "query", "schema": {"type": "integer"}}]
    paths: dict[str, Any] = {
        "/v1/planted/failing": {"get": {"parameters": asked, "responses": answers | refused}},
        "/v1/planted/away": {"get": {"responses": answers | refused}},
        "/v1/planted/other": {"get": {"responses": answers}},
    }
    target = target_of(served)
    document = {"openapi": "3.1.0", "info": {"title": "planted", "version": "1"}, "paths": paths}
    report = ask_everything(
        Target(url=target.url, document=document, identities=target.identities, known=target.known), examples=EXAMPLES
    )
    kinds = {operation: set(found) for operation, found in report.findings.items()}
    assert kinds == {
        "GET /v1/planted/failing": {"ServerError 500"},
        "GET /v1/planted/away": {"ServerError 503"},
        "GET /v1/planted/other": {"JsonSchemaError 200"},
    }
