"""What operators do beside clean-up: sites, workers, purging, deleting tenants; and the log of all that they do."""

import io
import time
import zipfile
from datetime import timedelta

import pytest
import sqlalchemy as sa

from service.adapters.sql.schema import metadata
from service.core.errors import Unavailable
from service.core.ids import new_run_id
from service.usecases.keys import key_hash
from service.usecases.leftovers import finish_deletions
from tests.factories import make_result
from tests.integration.api.conftest import Served
from tests.integration.api.test_cleanup import SITE, Platform, audit, away, on_both_databases

# --- sites, workers, retention ----------------------------------------------------------------------------------------


@on_both_databases
def test_a_site_is_forgotten_when_it_is_silent_or_when_it_is_forced(served: Served) -> None:
    operator = served.client("operator")
    platform = Platform(served)
    held, _ = platform.play()
    served.store.mark_collecting(held.run.id, held.fence)
    served.store.finish(held.run.id, held.fence, make_result())
    platform.reaper.look()
    assert operator.delete(f"/v1/admin/sites/{SITE}").json()["code"] == "site_alive"
    away(served, SITE)

    assert operator.delete(f"/v1/admin/sites/{SITE}").status_code == 204

    assert operator.get("/v1/admin/boundaries").json()["items"] == []
    assert served.store.undestroyed(SITE) == []
    assert operator.delete(f"/v1/admin/sites/{SITE}").status_code == 404
    platform.reaper.look()
    assert operator.delete(f"/v1/admin/sites/{SITE}", params={"force": "true"}).status_code == 204
    assert [(what, result) for what, _, result in audit(served)] == [
        ("site.forget", "refused: site_alive"), ("site.forget", "done: 1 boundaries count as gone"),
        ("site.forget", "refused: not_found"), ("site.forget", "done: 0 boundaries count as gone"),
    ]  # fmt: skip


@on_both_databases
def test_a_drained_worker_claims_nothing_and_is_seen_to_finish_what_it_plays(served: Served) -> None:
    operator = served.client("operator")
    served.submit("acme")
    served.submit("acme")
    held = served.claim()

    draining = operator.post("/v1/admin/drain", json={"worker": "wrk_1"})

    assert draining.status_code == 202
    assert (draining.json()["state"], draining.json()["playing"]) == ("draining", 1)
    with pytest.raises(AssertionError):
        served.claim()
    served.store.mark_running(held.run.id, held.fence)
    served.store.mark_collecting(held.run.id, held.fence)
    served.store.finish(held.run.id, held.fence, make_result())
    (worker,) = operator.get("/v1/admin/workers").json()["items"]
    assert (worker["id"], worker["state"], worker["playing"], worker["draining"]) == ("wrk_1", "drained", 0, True)
    assert operator.post("/v1/admin/drain", json={"worker": "wrk_9"}).status_code == 404
    assert audit(served) == [("worker.drain", "wrk_1", "done"), ("worker.drain", "wrk_9", "refused: not_found")]


@on_both_databases
def test_purging_is_a_dry_run_unless_it_is_not(served: Served) -> None:
    operator = served.client("operator")
    served.submit("acme")
    run_id = served.play()
    time.sleep(0.01)

    dry = operator.post("/v1/admin/purge", json={"older_than_s": 0}).json()
    young = operator.post("/v1/admin/purge", json={"older_than_s": 3600, "dry_run": False}).json()

    assert (dry["dry_run"], dry["runs"]) == (True, 1)
    assert (young["dry_run"], young["runs"]) == (False, 0)
    assert served.client("acme").get(f"/v1/runs/{run_id}").status_code == 200
    assert operator.post("/v1/admin/purge", json={"older_than_s": 0, "dry_run": False}).json()["runs"] == 1
    assert served.client("acme").get(f"/v1/runs/{run_id}").status_code == 404
    assert operator.post("/v1/admin/purge", json={}).status_code == 422
    assert [(what, result and result.split(",")[0]) for what, _, result in audit(served)] == [
        ("purge", "done: 0 runs"), ("purge", "done: 1 runs")
    ]  # fmt: skip


# --- deleting tenants -------------------------------------------------------------------------------------------------


@on_both_databases
def test_a_deleted_tenant_leaves_nothing_but_its_name_and_the_audit_row(served: Served) -> None:
    """Every column of every table is searched for the name, and for its run's id."""
    operator, store = served.client("operator"), served.store
    bundle = {"bundle": ("b.zip", make_zip()), "scenario": (None, "name: gone\nsteps: [{name: x, run: 'true'}]\n")}
    made = served.client("globex").post("/v1/runs", files=bundle, headers={"Idempotency-Key": "once"})
    assert made.status_code == 202, made.text
    done = served.play()
    assert store.begin_idempotent("globex", "more", stale_after=timedelta(hours=1))
    stays = served.submit("acme")["id"]
    blobs = served.app.state.context.deps.blobs
    blobs.put_bytes("globex", b"left by a crash")
    assert blobs.older_than("globex", timedelta(0))
    tell_everything(served)
    assert {"run", "run_blob", "outbox", "idempotency", "api_key", "tenant"} <= mentioning(served, "globex", done)

    assert operator.delete("/v1/admin/tenants/globex").status_code == 204

    assert mentioning(served, "globex", done) == {"tenant", "audit", "run"} - {"run"}
    assert blobs.older_than("globex", timedelta(0)) == []
    assert store.deleted_tenants() == []
    assert operator.post("/v1/admin/tenants", json={"name": "globex"}).json()["code"] == "tenant_exists"
    assert served.client("acme").get(f"/v1/runs/{stays}").status_code == 200
    assert ("tenant.delete", "globex", "done") in audit(served)


def test_what_still_plays_is_cancelled_and_purged_when_it_has_ended(served: Served) -> None:
    bounds = served.app.state.context.deps.bounds
    object.__setattr__(bounds, "deletion_wait_s", 0.1)
    served.submit("globex")
    held = served.claim()

    assert served.client("operator").delete("/v1/admin/tenants/globex").status_code == 204

    assert served.store.deleted_tenants() == ["globex"]
    assert served.store.look(held.run.id, held.fence).cancel_requested_by == "operator"
    served.store.finish(held.run.id, held.fence, make_result())
    served.store.record_destroyed(held.run.id, held.fence)
    tell_everything(served)
    assert finish_deletions(served.store, served.app.state.context.deps.blobs) == 1
    assert mentioning(served, "globex", held.run.id) == {"tenant", "audit"}


def tell_everything(served: Served) -> None:
    """As the relay would; nobody has a webhook."""
    assert served.store.lead("relay", lease=timedelta(hours=1))
    served.store.mark_published([row.pub_seq for row in served.store.stamp("relay", limit=1000)])


def mentioning(served: Served, *words: str) -> set[str]:
    found = set()
    with served.store._db.read() as connection:
        for table in metadata.sorted_tables:
            if any(word in str(row) for row in connection.execute(sa.select(table)) for word in words):
                found.add(table.name)
    return found


def make_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", "of a tenant that goes")
    return out.getvalue()


# --- the audit log ----------------------------------------------------------------------------------------------------


@on_both_databases
def test_every_act_of_an_operator_is_in_the_log_with_who_and_which_result(served: Served) -> None:
    operator = served.client("operator")
    run = served.submit("acme")["id"]
    operator.post("/v1/admin/tenants", json={"name": "initech", "trust": "trusted"})
    operator.post("/v1/admin/tenants", json={"name": "initech"})
    operator.patch("/v1/admin/tenants/initech", json={"quota": {"concurrent": 3}})
    key = operator.post("/v1/admin/tenants/initech/keys").json()
    operator.delete(f"/v1/admin/tenants/initech/keys/{key['id']}")
    operator.delete("/v1/admin/tenants/initech/keys/key_none")
    service = operator.post("/v1/admin/services", json={"name": "market"}).json()
    operator.post(f"/v1/admin/runs/{run}/kill")
    operator.post(f"/v1/admin/runs/{new_run_id()}/kill")
    operator.post("/v1/admin/dead-letters/dlv_none/replay")
    for path in ("tenants", "boundaries", "workers", "audit", "dead-letters"):
        assert operator.get(f"/v1/admin/{path}").status_code == 200

    answer = operator.get("/v1/admin/audit")

    assert [(row["what"], row["target"], row["result"]) for row in reversed(answer.json()["items"])][:8] == [
        ("tenant.create", "initech", "done"), ("tenant.create", "initech", "refused: tenant_exists"),
        ("tenant.change", "initech", "done"), ("key.create", "initech", f"done: {key['id']}"),
        ("key.revoke", "initech", "done"), ("key.revoke", "initech", "refused: not_found"),
        ("service.create", "market", "done"), ("run.kill", run, "done"),
    ]  # fmt: skip
    assert [what for what, _, _ in audit(served)][8:] == ["run.kill", "dead_letter.replay"]
    first = answer.json()["items"][-1]
    assert set(first) == {"id", "at", "who", "what", "target", "detail", "result"}
    assert first["detail"]["trust"] == "trusted"
    assert {row["who"] for row in answer.json()["items"]} == {first["who"]}
    assert first["who"].startswith("key_")
    for secret in (key["key"], service["key"], *served.keys.values()):
        assert secret not in answer.text


@on_both_databases
def test_what_a_service_does_to_its_tenants_is_in_the_log_too(served: Served) -> None:
    shop = served.client("shop")
    shop.post("/v1/tenants", json={"name": "stall", "quota": {"queued": 5}})
    shop.post("/v1/tenants", json={"name": "acme"})
    shop.patch("/v1/tenants/stall", json={"affinity": "gpu"})
    shop.patch("/v1/tenants/globex", json={"affinity": "gpu"})
    key = shop.post("/v1/tenants/stall/keys").json()
    shop.delete(f"/v1/tenants/stall/keys/{key['id']}")
    shop.delete("/v1/tenants/globex/keys/key_none")
    shop.delete("/v1/tenants/stall")
    assert [shop.get(path).status_code for path in ("/v1/tenants", "/v1/tenants/corner")] == [200, 200]

    answer = served.client("operator").get("/v1/admin/audit")

    rows = list(reversed(answer.json()["items"]))
    assert [(row["what"], row["target"], row["result"]) for row in rows] == [
        ("tenant.create", "stall", "done"), ("tenant.create", "acme", "refused: tenant_exists"),
        ("tenant.change", "stall", "done"), ("tenant.change", "globex", "refused: not_found"),
        ("key.create", "stall", f"done: {key['id']}"), ("key.revoke", "stall", "done"),
        ("key.revoke", "globex", "refused: not_found"), ("tenant.delete", "stall", "done"),
    ]  # fmt: skip
    used = served.store.find_key(key_hash(served.keys["shop"]))
    assert used is not None
    assert {row["who"] for row in rows} == {used.key_id}
    assert rows[0]["detail"]["quota"]["queued"] == 5
    assert rows[2]["detail"] == {"affinity": "gpu"}
    for secret in (key["key"], *served.keys.values()):
        assert secret not in answer.text


def test_what_a_service_cannot_have_written_down_first_is_not_done(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> str:
        raise Unavailable("the database cannot be used at the moment")

    shop = served.client("shop")
    with monkeypatch.context() as patch:
        patch.setattr(served.app.state.context.deps.custody, "begin_act", full)
        answers = [
            shop.post("/v1/tenants", json={"name": "stall"}), shop.patch("/v1/tenants/corner", json={"affinity": "x"}),
            shop.post("/v1/tenants/corner/keys"), shop.delete("/v1/tenants/corner/keys/key_1"),
            shop.delete("/v1/tenants/corner"),
        ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [503] * 5

    found = shop.get("/v1/tenants").json()["items"]
    assert [(tenant["name"], tenant["affinity"]) for tenant in found] == [("corner", None)]


def test_the_log_is_read_in_pages(served: Served) -> None:
    operator = served.client("operator")
    for n in range(5):
        operator.post("/v1/admin/services", json={"name": f"market-{n}"})
    first = operator.get("/v1/admin/audit", params={"limit": 3}).json()
    second = operator.get("/v1/admin/audit", params={"limit": 3, "cursor": first["next_cursor"]}).json()

    assert [row["target"] for row in first["items"] + second["items"]] == [f"market-{n}" for n in range(4, -1, -1)]
    assert second["next_cursor"] is None
    assert operator.get("/v1/admin/audit", params={"cursor": "aud_x"}).status_code == 422


def test_what_cannot_be_written_down_first_is_not_done(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    run = served.submit("acme")["id"]

    def full(**_: object) -> str:
        raise Unavailable("the database cannot be used at the moment")

    with monkeypatch.context() as patch:
        patch.setattr(served.app.state.context.deps.custody, "begin_act", full)
        assert served.client("operator").post(f"/v1/admin/runs/{run}/kill").status_code == 503
    assert served.client("acme").get(f"/v1/runs/{run}").json()["phase"] == "queued"

    assert served.client("operator").post(f"/v1/admin/runs/{run}/kill").json()["outcome"] == "cancelled"


def test_the_row_is_there_while_the_act_is_done(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[str, str, str | None]]] = []
    custody = served.app.state.context.deps.custody
    drain = custody.drain_worker

    def looking(worker_id: str) -> None:
        seen.append(audit(served))
        drain(worker_id)

    monkeypatch.setattr(custody, "drain_worker", looking)
    assert served.client("operator").post("/v1/admin/drain", json={"worker": "wrk_1"}).status_code == 202

    assert seen == [[("worker.drain", "wrk_1", None)]]
