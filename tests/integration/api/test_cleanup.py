"""Operators' clean-up over HTTP. The reaper of the site is real, over a fake platform, in a thread of this process."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from service.adapters.sql.schema import metadata
from service.cli.main import make_app
from service.core.boundary import Boundary, BoundaryKind, BoundaryRef
from service.core.ids import new_run_id
from service.core.ports.runs import Claim
from tests.factories import make_result
from tests.integration.api.conftest import DATABASES, Served
from tests.unit.test_kind_standby import PaperProvisioner
from workers.boundaries.cluster.driver import ClusterBoundary
from workers.boundaries.cluster.standby import Standby
from workers.boundaries.fake import FakeBoundary, FakeWorld, ResistingBoundary
from workers.reaper import Reaper

SITE = "here"
on_both_databases = pytest.mark.parametrize("settings", DATABASES, indirect=True)


class Platform:
    """A site's fake platform, and a reaper that attends but does not sweep: what is planned is there until it is
    ordered."""

    def __init__(self, served: Served, boundary: Boundary | None = None, *, site: str = SITE) -> None:
        self.served, self.site = served, site
        self.installation = served.store.installation_id()
        self.boundary: Any = boundary or FakeBoundary(installation=self.installation)
        self.reaper = Reaper(
            [self.boundary], served.store, served.hints, installation=self.installation, site=site,
            quarantine_after=timedelta(0),
        )  # fmt: skip

    def build(self, run_id: str | None = None, *, fence: int = 1, tenant: str = "acme") -> BoundaryRef:
        now = self.served.store.now()
        ref = BoundaryRef(
            installation=self.installation, kind=BoundaryKind.GVISOR, site=self.site, tenant=tenant,
            run_id=run_id or new_run_id(), fence=fence, expires_at=now + timedelta(minutes=5), created_at=now,
        )  # fmt: skip
        self.boundary.world.labels[ref.name] = ref
        return ref

    def play(self, who: str = "acme") -> tuple[Claim, BoundaryRef]:
        """A run of theirs, running in a boundary."""
        headers = {"Blastdoor-Tenant": "corner"} if who == "shop" else {}
        self.served.submit(who, headers=headers)
        held = self.served.claim()
        self.served.store.mark_running(held.run.id, held.fence)
        return held, self.build(held.run.id, fence=held.fence, tenant=held.run.tenant)

    @property
    def standing(self) -> set[str]:
        return set(self.boundary.world.labels)

    @contextmanager
    def attended(self) -> Iterator[None]:
        stop = threading.Event()

        def attend() -> None:
            while not stop.wait(0.02):
                self.reaper.attend()

        thread = threading.Thread(target=attend)
        self.reaper.look()
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.fixture
def platform(served: Served) -> Iterator[Platform]:
    made = Platform(served)
    with made.attended():
        yield made


def ask(served: Served, scope: dict[str, Any] | None = None, **more: Any) -> httpx.Response:
    body = more if scope is None else {"scope": scope} | more
    return served.client("operator").post("/v1/admin/cleanup", json=body)


def planned(answer: httpx.Response, *, status: int = 200) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    return document


def lines(plan: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    return {line["ref"]["name"]: (line["action"], line["result"]) for line in plan["actions"]}


def audit(served: Served) -> list[tuple[str, str, str | None]]:
    """Oldest first: what, of what, with which result."""
    items = served.client("operator").get("/v1/admin/audit").json()["items"]
    return [(row["what"], row["target"], row["result"]) for row in reversed(items)]


# --- what stands ------------------------------------------------------------------------------------------------------


@on_both_databases
def test_boundaries_are_listed_as_their_site_found_them(platform: Platform, served: Served) -> None:
    held, live = platform.play()
    orphan = platform.build()
    lost, overdue = platform.play()
    with served.store._db.write() as connection:
        run = metadata.tables["run"]
        ago = served.store.now() - timedelta(minutes=1)
        connection.execute(sa.update(run).where(run.c.id == lost.run.id).values(lease_until=ago))
    platform.reaper.look()

    rows = {row["name"]: row for row in served.client("operator").get("/v1/admin/boundaries").json()["items"]}

    assert {name: row["state"] for name, row in rows.items()} == {
        live.name: "live", orphan.name: "orphan", overdue.name: "overdue"
    }  # fmt: skip
    row = rows[live.name]
    assert set(row) == {
        "kind", "variant", "site", "name", "run", "tenant", "fence", "created_at", "expires_at", "observed_at", "state",
        "age_s", "standby",
    }  # fmt: skip
    assert row["standby"] is None
    assert 0 <= row["age_s"] < 60
    assert (row["kind"], row["variant"], row["site"], row["run"]) == ("gvisor", None, SITE, held.run.id)
    assert (row["tenant"], row["fence"]) == ("acme", 1)


@on_both_databases
def test_clusters_are_listed_with_age_tenant_and_run_and_so_is_what_is_kept_ready(
    served: Served, tmp_path: Path
) -> None:
    """Directories where there would be clusters; all else is real, from the keeper of standby clusters to the command
    that an operator types."""
    clusters = PaperProvisioner(tmp_path / "clusters", installation=served.store.installation_id())
    standby = Standby(clusters, wanted=1, prepare=lambda *_: None)
    boundary = ClusterBoundary(
        installation=served.store.installation_id(), site=SITE, images={}, provisioners=[clusters], standby=standby
    )
    platform = Platform(served, boundary)
    standby.keep(cancelled=threading.Event())
    served.submit("acme")
    held = served.claim()
    served.store.mark_running(held.run.id, held.fence)
    now = served.store.now()
    claimed = BoundaryRef(
        installation=platform.installation, kind=BoundaryKind.CLUSTER, variant="kind", site=SITE, tenant="acme",
        run_id=held.run.id, fence=held.fence, expires_at=now + timedelta(minutes=5),
        created_at=now - timedelta(minutes=3),
    )  # fmt: skip
    assert standby.claim(claimed)
    standby.keep(cancelled=threading.Event())
    clusters.create(
        clusters.made[-1].model_copy(update={"run_id": new_run_id()}), cancelled=threading.Event(), tell=print
    )
    _, ready, half = clusters.made
    platform.reaper.look()

    shown = command(served, "boundaries", "--json")
    rows = {row["name"]: row for row in json.loads(shown)["items"]}
    assert {name: (row["run"], row["tenant"], row["standby"], row["state"]) for name, row in rows.items()} == {
        claimed.name: (held.run.id, "acme", "claimed", "live"),
        ready.name: (ready.run_id, "_standby", "ready", "live"),
        half.name: (half.run_id, "_standby", "being_made", "live"),
    }
    assert 180 <= rows[claimed.name]["age_s"] < 240
    assert 0 <= rows[ready.name]["age_s"] < 60
    table = {line.split()[0]: line for line in command(served, "boundaries").splitlines() if line.startswith("bd-")}
    assert all(words in table[claimed.name] for words in (" acme ", held.run.id, " 3 min ", "cluster/kind", "claimed"))
    assert "run_" not in table[ready.name]
    assert "being made" in table[half.name]


def command(served: Served, *arguments: str) -> str:
    """-> what `blastdoor admin ...` prints, on a wide terminal."""
    reach = {"BLASTDOOR_URL": served.url, "BLASTDOOR_KEY": served.keys["operator"], "COLUMNS": "160"}
    ended = CliRunner().invoke(make_app(), ["admin", *arguments], env=reach)
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_what_a_silent_site_had_is_quarantined_until_it_answers(platform: Platform, served: Served) -> None:
    ref = platform.build()
    platform.reaper.look()
    away(served, SITE)

    def state() -> str:
        (row,) = served.client("operator").get("/v1/admin/boundaries").json()["items"]
        assert row["name"] == ref.name
        return str(row["state"])

    assert state() == "quarantined"
    (site,) = served.client("operator").get("/v1/admin/boundaries").json()["sites"]
    assert (site["name"], site["silent"]) == (SITE, True)
    platform.reaper.look()
    assert state() == "orphan"


def away(served: Served, site: str) -> None:
    """As if it had not answered for ten minutes."""
    table = metadata.tables["site"]
    with served.store._db.write() as connection:
        ago = served.store.now() - timedelta(minutes=10)
        connection.execute(sa.update(table).where(table.c.name == site).values(last_seen_at=ago, asked_at=None))


# --- plans ------------------------------------------------------------------------------------------------------------


@on_both_databases
def test_a_dry_run_is_the_default_and_what_it_shows_is_exactly_what_is_then_done(
    platform: Platform, served: Served
) -> None:
    orphans = [platform.build() for _ in range(3)]
    held, live = platform.play()
    shown = planned(ask(served, {"orphans": True}))

    assert shown["applied"] is False
    assert lines(shown) == {ref.name: ("destroy", None) for ref in orphans}
    assert {line["why"] for line in shown["actions"]} == {f"no run claims fence 1 of {ref.run_id}" for ref in orphans}
    assert platform.standing == {ref.name for ref in (*orphans, live)}
    later = platform.build()  # after the plan was shown: not in it

    applied = planned(ask(served, plan=shown["id"], dry_run=False))

    assert (applied["id"], applied["applied"]) == (shown["id"], True)
    assert lines(applied) == {ref.name: ("destroy", "destroyed") for ref in orphans}
    assert platform.standing == {live.name, later.name}
    assert planned(served.client("operator").get(f"/v1/admin/cleanup/{shown['id']}")) == applied
    assert planned(ask(served, plan=shown["id"], dry_run=False)) == applied, "twice is once"
    assert audit(served) == [("cleanup.apply", shown["id"], "ordered: 3 destroy")]
    assert served.store.get_run(held.run.id, None).phase == "running"


def test_what_is_said_of_the_scope_is_combined_by_and(platform: Platform, served: Served) -> None:
    held, live = platform.play()
    _, corners = platform.play("shop")
    orphan, other = platform.build(), platform.build(tenant="globex")
    old = platform.build()
    platform.boundary.world.labels[old.name] = old.model_copy(
        update={"created_at": served.store.now() - timedelta(hours=1)}
    )
    everything = {ref.name for ref in (live, corners, orphan, other, old)}
    for scope, expected in (
        ({"older_than_s": 0}, everything),
        ({"tenant": "acme"}, {live.name, orphan.name, old.name}),
        ({"tenant": "acme", "orphans": True}, {orphan.name, old.name}),
        ({"tenant": "globex", "orphans": True}, {other.name}),
        ({"run": held.run.id}, {live.name}),
        ({"run": held.run.id, "tenant": "globex"}, set()),
        ({"boundary": orphan.name}, {orphan.name}),
        ({"boundary": orphan.name, "run": other.run_id}, set()),
        ({"older_than_s": 1800}, {old.name}),
        ({"older_than_s": 1800, "tenant": "globex"}, set()),
    ):
        assert set(lines(planned(ask(served, scope)))) == expected, scope


@pytest.mark.parametrize("body", [{}, {"scope": {}}, {"scope": {"orphans": False}}, {"dry_run": False, "force": True}])
def test_a_scope_that_says_nothing_is_refused_and_named(
    platform: Platform, served: Served, body: dict[str, Any]
) -> None:
    platform.build()
    answer = ask(served, **body)

    assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")
    assert [row["path"] for row in answer.json()["errors"]] == ["scope"]
    assert len(platform.standing) == 1
    assert audit(served) == []


@on_both_databases
def test_what_is_live_is_refused_without_force(platform: Platform, served: Served) -> None:
    held, live = platform.play()
    orphan = platform.build()
    shown = planned(ask(served, {"tenant": "acme"}))
    assert lines(shown) == {live.name: ("refuse", None), orphan.name: ("destroy", None)}

    applied = planned(ask(served, {"tenant": "acme"}, dry_run=False))

    assert lines(applied) == {live.name: ("refuse", "refused"), orphan.name: ("destroy", "destroyed")}
    assert platform.standing == {live.name}
    run = served.store.lease_of(held.run.id)
    assert run is not None
    assert (run.phase, run.cancel_requested_by) == ("running", None)


@on_both_databases
def test_with_force_its_run_is_ended_by_the_operator_and_the_boundary_destroyed(
    platform: Platform, served: Served
) -> None:
    """The worker sees the cancellation, ends the run and destroys what it made; the reaper sees that it is gone."""
    held, live = platform.play()
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(ask(served, {"run": held.run.id}, dry_run=False, force=True))
    )
    asking.start()
    until(lambda: served.store.look(held.run.id, held.fence).cancel_requested_by == "operator")
    platform.boundary.destroy(live)
    asking.join()

    assert lines(planned(answers[0])) == {live.name: ("kill", "destroyed")}
    assert audit(served)[-1][2] == "ordered: 1 kill"


def test_with_force_a_worker_that_does_nothing_loses_its_boundary_all_the_same(
    platform: Platform, served: Served
) -> None:
    held, live = platform.play()
    began = time.monotonic()
    applied = planned(ask(served, {"boundary": live.name}, dry_run=False, force=True))

    assert lines(applied) == {live.name: ("kill", "destroyed")}
    assert time.monotonic() - began >= 3.0, "it had its grace"
    assert platform.standing == set()
    assert served.store.look(held.run.id, held.fence).cancel_requested_by == "operator"


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_each_line_is_looked_at_again_when_it_is_applied(platform: Platform, served: Served) -> None:
    """Shown as an orphan; by the time of the order its run has been claimed under just this fence."""
    served.submit("acme")
    held_id = served.store.list_runs("acme", phase=None, outcome=None, limit=1, before=None).items[0].id
    ref = platform.build(held_id, fence=1)
    shown = planned(ask(served, {"run": held_id}))
    assert lines(shown) == {ref.name: ("destroy", None)}
    assert served.claim().run.id == held_id

    applied = planned(ask(served, plan=shown["id"], dry_run=False))

    assert lines(applied) == {ref.name: ("destroy", "refused: somebody acts on it again")}
    assert platform.standing == {ref.name}


def test_what_resists_is_quarantined_and_the_plan_says_so(served: Served) -> None:
    class Stubborn(ResistingBoundary):
        refusals = 1_000_000

    stubborn = Stubborn(world=FakeWorld())
    stubborn._installation = served.store.installation_id()
    platform = Platform(served, stubborn)
    with platform.attended():
        held, ref = platform.play()
        served.store.mark_collecting(held.run.id, held.fence)
        served.store.finish(held.run.id, held.fence, make_result())
        applied = planned(ask(served, {"run": held.run.id}, dry_run=False))
        rows = served.client("operator").get("/v1/admin/boundaries").json()["items"]

    assert lines(applied) == {ref.name: ("destroy", f"quarantined: {ref.name} resists")}
    assert [row["state"] for row in rows] == ["quarantined"]


def test_a_site_that_does_not_answer_leaves_the_plan_open_with_202(served: Served) -> None:
    bounds = served.app.state.context.deps.bounds
    object.__setattr__(bounds, "cleanup_wait_s", 0.3)
    object.__setattr__(bounds, "look_deadline_s", 0.2)
    platform = Platform(served)
    ref = platform.build()
    platform.reaper.look()

    applied = planned(ask(served, {"orphans": True}, dry_run=False), status=202)

    assert (applied["applied"], applied["done_at"], lines(applied)) == (True, None, {ref.name: ("destroy", None)})
    platform.reaper.attend()
    done = planned(served.client("operator").get(f"/v1/admin/cleanup/{applied['id']}"))
    assert lines(done) == {ref.name: ("destroy", "destroyed")}
    assert done["done_at"] is not None


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"plan": "cln_0", "dry_run": False}, 404, "not_found"),
        ({"plan": "cln_0"}, 422, "request_invalid"),
        ({"plan": "cln_0", "dry_run": False, "scope": {"orphans": True}}, 422, "request_invalid"),
        ({"scope": {"tenants": "acme"}}, 422, "request_invalid"),
        ({"scope": {"older_than_s": -1}}, 422, "request_invalid"),
        ({"scope": {"tenant": ""}}, 422, "request_invalid"),
    ],
)
def test_what_cannot_be_meant_is_refused(served: Served, body: dict[str, Any], status: int, code: str) -> None:
    answer = ask(served, **body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_plan_that_was_shown_without_force_is_not_applied_with_it(platform: Platform, served: Served) -> None:
    _, live = platform.play()
    shown = planned(ask(served, {"tenant": "acme"}))

    assert ask(served, plan=shown["id"], dry_run=False, force=True).json()["code"] == "plan_not_forced"
    assert platform.standing == {live.name}
