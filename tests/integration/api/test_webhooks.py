"""Webhooks over HTTP: whose they are, what is shown once, which URLs are refused before anything is connected to."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import pytest

from service.core.webhooks.addresses import Address
from service.core.webhooks.models import Settlement
from service.core.webhooks.schedule import Fault, State
from service.settings import Settings
from tests.integration.api.conftest import DATABASES, Served, make_settings, serve
from tests.receivers import canary_on_a_webhook_port
from tests.servers import LOOPBACK, RedisServer

EXCEPTED = "127.0.0.1:9"
URL = f"http://{EXCEPTED}/hooks"
CORNER = {"Blastdoor-Tenant": "corner"}


@pytest.fixture
def settings(
    tmp_path: Any, redis_server: RedisServer, sqlite_database: str, request: pytest.FixtureRequest
) -> Settings:
    database = request.getfixturevalue(getattr(request, "param", "sqlite_database"))
    return make_settings(tmp_path, database, redis_server.url, webhook_allow=EXCEPTED)


def create(served: Served, who: str = "acme", *, headers: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    answer = served.client(who).post("/v1/webhooks", json={"url": URL} | more, headers=headers)
    assert answer.status_code == 201, answer.text
    document: dict[str, Any] = answer.json()
    return document


def fail_all(served: Served, endpoint_id: str, *, state: State = State.DEAD) -> list[str]:
    """As a dispatcher would, whose every attempt failed. -> the deliveries' ids."""
    served.store.fan_out(limit=100)
    claimed = served.store.claim_deliveries({endpoint_id: 100}, lease=timedelta(seconds=30))
    served.store.settle_deliveries(
        [
            Settlement(
                delivery_id=one.delivery_id, endpoint_id=endpoint_id, fence=one.fence, state=state, status=500,
                error=Fault.STATUS,
            )
            for one in claimed
        ]
    )  # fmt: skip
    return [one.delivery_id for one in claimed]


@pytest.mark.parametrize("settings", DATABASES, indirect=True)
def test_one_is_made_read_rotated_and_deleted_and_its_secret_shown_once(served: Served) -> None:
    made = create(served, types=["dev.blastdoor.run.finished"])
    acme = served.client("acme")
    assert set(made) >= {"id", "url", "types", "enabled", "secret"}
    assert (made["url"], made["types"], made["enabled"]) == (URL, ["dev.blastdoor.run.finished"], True)
    assert made["secret"].startswith("whsec_")
    shown = acme.get(f"/v1/webhooks/{made['id']}")
    assert shown.json() == {name: value for name, value in made.items() if name != "secret"}
    assert acme.get("/v1/webhooks").json() == {"items": [shown.json()]}

    rotated = acme.post(f"/v1/webhooks/{made['id']}/rotate").json()
    assert rotated["secret"].startswith("whsec_")
    assert rotated["secret"] != made["secret"]
    assert rotated["old_secret_until"] is not None
    for secret in (made["secret"], rotated["secret"]):
        assert secret not in acme.get("/v1/webhooks").text
        assert secret not in served.log.getvalue()

    assert acme.delete(f"/v1/webhooks/{made['id']}").status_code == 204
    assert acme.get(f"/v1/webhooks/{made['id']}").status_code == 404
    assert acme.get("/v1/webhooks").json() == {"items": []}


def test_another_owner_s_is_the_same_404_as_one_that_never_was(served: Served) -> None:
    tenants, corners, services = create(served), create(served, "shop", headers=CORNER), create(served, "shop")
    for who, headers, foreign in (
        ("globex", {}, tenants), ("shop", CORNER, services), ("shop", {}, corners), ("shop", {}, tenants),
    ):  # fmt: skip
        client = served.client(who)
        for method, rest in (
            ("GET", ""), ("DELETE", ""), ("POST", "/rotate"), ("GET", "/deliveries"),
            ("POST", "/deliveries/dlv_1/replay"),
        ):  # fmt: skip
            told = []
            for id_ in (foreign["id"], "whk_" + "0" * 32):
                answer = client.request(method, f"/v1/webhooks/{id_}{rest}", headers=headers)
                fixed = {name: value for name, value in answer.json().items() if name not in ("instance", "request_id")}
                told.append((answer.status_code, fixed))
            assert told[0] == told[1], (who, method, rest)
            assert told[0][0] == 404
    ids = [row["id"] for row in served.client("shop").get("/v1/webhooks").json()["items"]]
    assert ids == [services["id"]]
    ids = [row["id"] for row in served.client("shop").get("/v1/webhooks", headers=CORNER).json()["items"]]
    assert ids == [corners["id"]]
    assert served.client("shop").get("/v1/webhooks", headers={"Blastdoor-Tenant": "acme"}).status_code == 404


@pytest.mark.parametrize("settings", DATABASES, indirect=True)
def test_the_log_has_pages_and_what_was_given_up_can_be_sent_again(served: Served) -> None:
    made, acme, operator = create(served), served.client("acme"), served.client("operator")
    base = f"/v1/webhooks/{made['id']}/deliveries"
    for _ in range(3):
        served.submit()
    ids = fail_all(served, made["id"])
    assert len(ids) == 3

    first = acme.get(base, params={"limit": 2}).json()
    rest = acme.get(base, params={"limit": 2, "cursor": first["next_cursor"]}).json()
    rows = first["items"] + rest["items"]
    assert {row["id"] for row in rows} == set(ids)
    assert (rest["next_cursor"], rest["pending"]) == (None, 0)
    assert set(rows[0]) >= {"id", "event_id", "attempt", "at", "status", "error", "next_at"}
    assert (rows[0]["attempt"], rows[0]["status"], rows[0]["error"], rows[0]["next_at"]) == (1, 500, "status", None)
    for cursor in ("x", "-1", "0", "9" * 30, "١"):
        refused = acme.get(base, params={"cursor": cursor})
        assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, "query.cursor")

    page = operator.get("/v1/admin/dead-letters", params={"limit": 2}).json()
    last = operator.get("/v1/admin/dead-letters", params={"limit": 2, "cursor": page["next_cursor"]}).json()
    letters = page["items"] + last["items"]
    assert {letter["id"] for letter in letters} == set(ids)
    assert {(letter["tenant"], letter["webhook_id"], letter["url"]) for letter in letters} == {
        ("acme", made["id"], URL)
    }
    assert operator.get("/v1/admin/dead-letters", params={"cursor": "x"}).status_code == 422

    by_owner = acme.post(f"{base}/{ids[0]}/replay")
    by_operator = operator.post(f"/v1/admin/dead-letters/{ids[1]}/replay")
    for answer, id_ in ((by_owner, ids[0]), (by_operator, ids[1])):
        assert (answer.status_code, answer.json()) == (202, {"id": id_, "webhook_id": made["id"]})
    assert acme.get(base).json()["pending"] == 2
    assert operator.post("/v1/admin/dead-letters/dlv_never/replay").status_code == 404


def test_a_service_hears_of_all_its_tenants_and_of_no_others(served: Served) -> None:
    made = create(served, "shop")
    served.submit("acme")
    served.submit("shop", headers=CORNER)
    fail_all(served, made["id"])
    letters = served.client("operator").get("/v1/admin/dead-letters").json()["items"]
    assert [letter["tenant"] for letter in letters] == ["corner"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "[::1]", "10.0.0.1", "192.168.1.1", "172.16.0.1", "0.0.0.0", "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]", "2130706433", "0x7f000001", "127.1", "169.254.169.254", "metadata.google.internal",
        "user@127.0.0.1",
    ],
)  # fmt: skip
def test_d07_d08_what_leads_inside_is_refused_at_registration(served: Served, host: str) -> None:
    with canary_on_a_webhook_port() as (port, hits):
        answer = served.client("acme").post("/v1/webhooks", json={"url": f"https://{host}:{port}/"})
    assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")
    assert [row["path"] for row in answer.json()["errors"]] == ["url"]
    assert hits == []
    assert served.client("acme").get("/v1/webhooks").json() == {"items": []}


@pytest.fixture
def names(served: Served) -> dict[str, list[str]]:
    """What names lead to; who is not in it leads nowhere."""
    known: dict[str, list[str]] = {}

    def resolve(host: str, port: int) -> Sequence[Address]:
        if host not in known:
            raise OSError("no such name")
        return [ip_address(address) for address in known[host]]

    context = served.app.state.context
    context.deps = replace(context.deps, resolver=resolve)
    return known


def test_every_answer_of_a_name_is_judged(served: Served, names: dict[str, list[str]]) -> None:
    names["good.example.com"] = ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
    names["mixed.example.com"] = ["93.184.215.14", LOOPBACK]
    acme = served.client("acme")
    create(served, url="https://good.example.com/hooks?x=1")
    for url in ("https://mixed.example.com/", "https://nowhere.example.com/"):
        answer = acme.post("/v1/webhooks", json={"url": url})
        assert answer.status_code == 422, url
        assert answer.json()["errors"][0]["path"] == "url"


@pytest.mark.parametrize(
    "body",
    [
        {}, {"url": URL, "types": []}, {"url": URL, "types": ["dev.blastdoor.run.exploded"]},
        {"url": URL, "secret": "whsec_mine"}, {"url": "http://127.0.0.1:10/"}, {"url": "ftp://127.0.0.1:9/"},
        {"url": "https://a.example.com:22/"}, {"url": "http://a.example.com/"},
        {"url": "https://a.example.com/" + "x" * 2048},
    ],
)  # fmt: skip
def test_what_is_no_webhook_is_refused(served: Served, names: dict[str, list[str]], body: dict[str, Any]) -> None:
    names["a.example.com"] = ["93.184.215.14"]
    answer = served.client("acme").post("/v1/webhooks", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")


def test_an_owner_has_twenty_at_most(served: Served) -> None:
    for _ in range(20):
        create(served)
    refused = served.client("acme").post("/v1/webhooks", json={"url": URL})
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    create(served, "globex")


def test_without_a_key_for_secrets_there_are_none(
    tmp_path: Any, redis_server: RedisServer, sqlite_database: str
) -> None:
    settings = make_settings(tmp_path, sqlite_database, redis_server.url, secrets_key="", webhook_allow=EXCEPTED)
    for served in serve(settings):
        refused = served.client("acme").post("/v1/webhooks", json={"url": URL})
        assert (refused.status_code, refused.json()["code"]) == (501, "not_configured")
        assert "BLASTDOOR_SECRETS_KEY" in refused.json()["detail"]
        assert served.client("acme").get("/v1/webhooks").json() == {"items": []}
