"""Who may ask what: every route with every kind of key, and two tenants that must not learn of each other."""

from typing import Any

import httpx
import pytest

from service.core.ids import new_run_id
from tests.integration.api.conftest import DATABASES, Served

OPEN = {"/healthz", "/readyz"}
EVERYONE = ("nobody", "acme", "shop", "operator")
on_both_databases = pytest.mark.parametrize("settings", DATABASES, indirect=True)


def _allowed(path: str) -> set[str]:
    """By the contract's table, not by the code: whose key a path is for."""
    if path in OPEN:
        return set(EVERYONE)
    if path.startswith("/v1/admin/"):
        return {"operator"}
    return {"shop"} if path.startswith("/v1/tenants") else {"acme", "shop"}


def _operations(served: Served) -> list[tuple[str, str]]:
    paths = served.client("nobody").get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, of_path in paths.items() for method in of_path]


def test_every_route_takes_its_own_kinds_of_key_and_no_other(served: Served) -> None:
    operations = _operations(served)
    assert len(operations) >= 38
    for method, path in operations:
        url = path.replace("{run_id}", new_run_id()).replace("{name}", "unknown").replace("{key_id}", "key_1")
        url = url.replace("{webhook_id}", "whk_1").replace("{delivery_id}", "dlv_1")
        url = url.replace("{plan_id}", "cln_1").replace("{site}", "nowhere")
        for who in EVERYONE:
            headers = {"Blastdoor-Tenant": "corner"} if who == "shop" else {}
            answer = served.client(who).request(method, url, headers=headers)
            told = (method, path, who, answer.status_code, answer.text)
            if who in _allowed(path):
                assert answer.status_code not in (401, 403, 500), told
            else:
                assert answer.status_code == (401 if who == "nobody" else 403), told
                assert answer.json()["code"] == ("unauthenticated" if who == "nobody" else "forbidden"), told


def test_the_open_routes_are_exactly_those_that_are_meant_to_be_open(served: Served) -> None:
    served.pass_canary()
    routes = {path for _, path in _operations(served)}

    without_key = {p for p in routes if served.client("nobody").get(p.replace("{", "").replace("}", "")).is_success}

    assert without_key == OPEN


def test_what_is_no_key_of_ours_is_401(served: Served) -> None:
    for header in (
        "", "Bearer", "Basic YTpi", "bd_t_abc", "Bearer bd_t_abc", "Bearer bd_t_" + "A" * 43,
        "Bearer bd_x_" + "A" * 43, "Bearer " + "A" * 5000, "Bearer bd_t_' OR 1=1 --",
    ):  # fmt: skip
        answer = httpx.get(f"{served.url}/v1/runs", headers={"Authorization": header})

        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), header
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_revoked_key_is_401_at_once(served: Served) -> None:
    made = served.client("operator").post("/v1/admin/tenants/acme/keys").json()
    headers = {"Authorization": f"Bearer {made['key']}"}
    assert httpx.get(f"{served.url}/v1/runs", headers=headers).status_code == 200

    assert served.client("operator").delete(f"/v1/admin/tenants/acme/keys/{made['id']}").status_code == 204

    assert httpx.get(f"{served.url}/v1/runs", headers=headers).status_code == 401


@on_both_databases
def test_another_tenants_run_is_the_same_404_as_one_that_never_was(served: Served) -> None:
    theirs, never = served.submit("acme")["id"], new_run_id()
    globex = served.client("globex")
    for method, suffix in (("GET", ""), ("GET", "?wait=1"), ("DELETE", ""), ("POST", "/cancel")):
        problems = [globex.request(method, f"/v1/runs/{run_id}{suffix}") for run_id in (theirs, never)]
        assert [answer.status_code for answer in problems] == [404, 404]
        assert _comparable(problems[0], theirs) == _comparable(problems[1], never)
    assert globex.get("/v1/runs").json() == {"items": [], "next_cursor": None}
    assert served.client("acme").get(f"/v1/runs/{theirs}").json()["phase"] == "queued"


def _comparable(answer: httpx.Response, run_id: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers byte by byte, but for the two members that may differ, each of which must be there."""
    request_id = answer.headers["x-request-id"]
    body = answer.content.replace(run_id.encode(), b"RUN").replace(request_id.encode(), b"REQUEST")
    assert b"RUN" in body
    assert b"REQUEST" in body
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "date")}
    return body, headers


def test_another_tenants_name_in_the_header_is_the_same_404_for_a_tenant_key(served: Served) -> None:
    asked = [
        served.client("acme").get("/v1/runs", headers={"Blastdoor-Tenant": name}) for name in ("globex", "never-was")
    ]

    assert [answer.status_code for answer in asked] == [404, 404]
    assert served.client("acme").get("/v1/runs", headers={"Blastdoor-Tenant": "acme"}).status_code == 200


@on_both_databases
def test_a_service_acts_for_the_tenants_it_created_and_for_no_others(served: Served) -> None:
    shop = served.client("shop")
    assert shop.post("/v1/tenants", json={"name": "kiosk"}).status_code == 201
    for own in ("corner", "kiosk"):
        run = served.submit("shop", headers={"Blastdoor-Tenant": own})
        assert run["tenant"] == own
        assert shop.get(f"/v1/runs/{run['id']}", headers={"Blastdoor-Tenant": own}).status_code == 200
    for other in ("acme", "never-was", "_canary", "a'b", ""):
        answer = shop.get("/v1/runs", headers={"Blastdoor-Tenant": other})
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert shop.get(f"/v1/runs/{run['id']}", headers={"Blastdoor-Tenant": "corner"}).status_code == 404
    missing = shop.get("/v1/runs")
    assert missing.status_code == 422
    assert missing.json()["errors"][0]["path"] == "header.Blastdoor-Tenant"


def test_a_service_sees_and_changes_its_own_tenants_only(served: Served) -> None:
    shop, operator = served.client("shop"), served.client("operator")
    made = shop.post("/v1/tenants", json={"name": "kiosk", "quota": {"concurrent": 3}}).json()
    assert made["key"].startswith("bd_t_")
    assert made["tenant"]["quota"] == {"concurrent": 3, "queued": 100, "storage_bytes": 2**30}
    assert [tenant["name"] for tenant in shop.get("/v1/tenants").json()["items"]] == ["corner", "kiosk"]
    changed = shop.patch("/v1/tenants/kiosk", json={"quota": {"queued": 7}, "ceilings": {"limits": {"wall": "30s"}}})
    assert changed.json()["quota"] == {"concurrent": 3, "queued": 7, "storage_bytes": 2**30}
    assert changed.json()["ceilings"]["limits"]["wall"] == "30s"
    for method in ("GET", "PATCH", "DELETE"):
        body: dict[str, Any] = {"json": {"trust": "trusted"}} if method == "PATCH" else {}
        assert shop.request(method, "/v1/tenants/acme", **body).status_code == 404
    assert operator.get("/v1/admin/tenants/acme").json()["trust"] == "untrusted"
    assert shop.post("/v1/tenants/acme/keys").status_code == 404
    assert shop.delete("/v1/tenants/kiosk").status_code == 204
    assert shop.get("/v1/tenants/kiosk").status_code == 404
    taken = shop.post("/v1/tenants", json={"name": "kiosk"})
    assert (taken.status_code, taken.json()["code"]) == (409, "tenant_exists")


def test_an_operator_makes_tenants_services_and_keys_that_work(served: Served) -> None:
    operator = served.client("operator")
    tenant = operator.post("/v1/admin/tenants", json={"name": "initech", "trust": "trusted", "affinity": "blue"}).json()
    service = operator.post("/v1/admin/services", json={"name": "market"}).json()
    for key, path in ((tenant["key"], "/v1/runs"), (service["key"], "/v1/tenants")):
        assert httpx.get(served.url + path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert service["key"].startswith("bd_s_")
    assert operator.post("/v1/admin/services", json={"name": "market"}).json()["code"] == "service_exists"
    names = [row["name"] for row in operator.get("/v1/admin/tenants").json()["items"]]
    assert names == ["acme", "corner", "globex", "initech"]
    services = operator.get("/v1/admin/services").json()["items"]
    assert services == sorted(services, key=lambda row: row["name"])
    assert {"id": service["id"], "name": "market"} in services
    assert [row["name"] for row in services] == ["market", "shop"]
    assert operator.patch("/v1/admin/tenants/initech", json={"affinity": None}).json()["affinity"] is None
    assert operator.get("/v1/admin/workers").json()["items"][0]["capabilities"][0]["boundary"] == "gvisor"
    assert operator.delete("/v1/admin/tenants/initech").status_code == 204
    assert httpx.get(f"{served.url}/v1/runs", headers={"Authorization": f"Bearer {tenant['key']}"}).status_code == 401


def test_an_operator_kills_a_run_of_any_tenant(served: Served) -> None:
    run = served.submit("acme")

    killed = served.client("operator").post(f"/v1/admin/runs/{run['id']}/kill")

    assert killed.status_code == 202
    assert (killed.json()["outcome"], killed.json()["reason"]) == ("cancelled", "cancelled_by_operator")


def test_keys_are_stored_as_hashes_and_appear_in_no_answer_and_no_log(served: Served) -> None:
    made = served.client("operator").post("/v1/admin/tenants/acme/keys").json()
    with served.store._db.read() as connection:
        stored = str(connection.exec_driver_sql("SELECT * FROM api_key").all())

    again = served.client("operator").get("/v1/admin/tenants/acme").text

    assert made["id"] in stored
    assert "/v1/admin/tenants/acme/keys" in served.log.getvalue()
    for text in (stored, again, served.log.getvalue()):
        for key in (made["key"], *served.keys.values()):
            assert key not in text
