"""The reaper's view of a cluster: what no run claims goes, what resists is quarantined, what is another's stays, and
operators' clean-up finds it by run and by tenant. Namespaces stand for runs here: a reaper looks at labels alone."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from typer.testing import CliRunner

from service.adapters.memory import MemoryHints
from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import run
from service.adapters.sql_store import SqlStore
from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.cleanup import ActionKind, BoundaryState, CleanupPlan, InventoryRow, Scope
from service.core.run import Phase
from service.metrics import new_registry
from service.usecases.cleanup import apply_plan, list_boundaries, make_plan
from tests.cluster.namespaces import Site, sweep
from tests.contract.store_steps import add_run, add_tenant, bring_to, types_told
from tests.faults.place import eventually
from tests.sandboxes import make_ref, make_spec
from tests.servers import LOOPBACK
from workers.boundaries.namespace.driver import NamespaceBoundary
from workers.cli import commands
from workers.kube import Cluster
from workers.kube.connection import Connection
from workers.metrics import ReaperMetrics
from workers.pods.render import render_namespace
from workers.reaper import Reaper

HELD = "test.example/held"
SILENT_AFTER = timedelta(minutes=5)


@dataclass
class World:
    """A database, its installation's driver, and namespaces as workers that are gone have left them."""

    site: Site
    state: Path
    store: SqlStore
    boundary: NamespaceBoundary
    metrics: ReaperMetrics

    @property
    def admin(self) -> Cluster:
        return self.site.ready.admin

    @property
    def installation(self) -> str:
        return self.store.installation_id()

    def reaper(self, **more: Any) -> Reaper:
        return Reaper(
            [self.boundary], self.store, MemoryHints(), installation=self.installation, site="here",
            on_quarantine=self.metrics.quarantined.inc, **more,
        )  # fmt: skip

    def leave(self, *, run_id: str | None = None, tenant: str = "acme", held: bool = False, **more: Any) -> BoundaryRef:
        """`held`: by a finalizer that nobody acts on, so that it stays Terminating."""
        installation = more.pop("installation", self.installation)
        ref = make_ref(installation=installation, run_id=run_id, **more)
        ref = ref.model_copy(update={"kind": BoundaryKind.NAMESPACE, "variant": "gvisor", "tenant": tenant})
        self.build(ref)
        if held:
            self.hold(ref, HELD)
        return ref

    def build(self, ref: BoundaryRef) -> None:
        """By the engine: admission lets nobody else make such a namespace."""
        self.site.ready.engine.apply(render_namespace(ref, make_spec())[0])

    def hold(self, ref: BoundaryRef, *finalizers: str) -> None:
        held = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ref.name, "finalizers": list(finalizers)}}
        self.admin.apply(held, owner="holder")

    def claimed(self) -> tuple[str, int]:
        """A run whose worker plays it. -> its id and fence."""
        add_run(self.store, boundary="namespace/gvisor")
        held = bring_to(self.store, Phase.RUNNING, boundaries=("namespace/gvisor",), site="here")
        return held.run.id, held.fence

    def lose_workers(self) -> None:
        """Their leases have run out."""
        with self.store._db.write() as connection:
            connection.execute(sa.update(run).values(lease_until=db_now() - timedelta(seconds=1)))

    def stands(self, *refs: BoundaryRef) -> list[bool]:
        return [self.admin.get("Namespace", ref.name) is not None for ref in refs]

    def rows(self) -> dict[str, InventoryRow]:
        """As `blastdoor admin boundaries` shows them."""
        return {row.ref.name: row for row in list_boundaries(self.store, silent_after=SILENT_AFTER)}


@pytest.fixture
def world(site: Site, tmp_path: Path) -> Iterator[World]:
    state = tmp_path / "state"
    state.mkdir()
    store = SqlStore(f"sqlite:///{state / 'blastdoor.db'}")
    store.migrate()
    add_tenant(store, concurrent=100)
    boundary = NamespaceBoundary(site.host("gvisor", installation=store.installation_id()))
    world = World(site, state, store, boundary, ReaperMetrics(new_registry("reaper")))
    with structlog.testing.capture_logs():
        yield world
    assert sweep(boundary, site.ready) == []
    store.close()


def test_what_no_run_claims_goes_and_what_is_claimed_stays(world: World) -> None:
    run_id, fence = world.claimed()
    live, stale = world.leave(run_id=run_id, fence=fence), world.leave(run_id=run_id, fence=fence + 1)
    orphan = world.leave()

    swept = world.reaper().sweep()

    assert {ref.name for ref in swept.destroyed} == {stale.name, orphan.name}
    assert world.stands(live, stale, orphan) == [True, False, False]
    assert {name: str(row.state) for name, row in world.rows().items()} == {live.name: "live"}
    assert world.rows()[live.name].ref.tenant == "acme", "by its name: the run is known"
    world.boundary.destroy(live)


def test_a_namespace_that_stays_terminating_is_quarantined_reported_and_released_when_it_goes(world: World) -> None:
    run_id, fence = world.claimed()
    stuck, reaper = world.leave(run_id=run_id, fence=fence, held=True), world.reaper(quarantine_after=timedelta(0))
    world.reaper().look()
    assert world.rows()[stuck.name].state is BoundaryState.LIVE
    world.lose_workers()

    swept = reaper.sweep()

    assert [ref.name for ref in swept.resisted] == [ref.name for ref in swept.quarantined] == [stuck.name]
    (namespace,) = world.admin.list("Namespace", labels={"blastdoor.dev/run": run_id})
    assert namespace["status"]["phase"] == "Terminating"
    row = world.rows()[stuck.name]
    assert (row.state, row.resisting_since is not None) == (BoundaryState.QUARANTINED, True)
    assert world.metrics.quarantined._value.get() == 1
    assert types_told(world.store, run_id).count("boundary.quarantined") == 1
    assert reaper.sweep().recorded == 0
    assert world.metrics.quarantined._value.get() == 1, "it is said once"

    world.hold(stuck)
    eventually(lambda: world.stands(stuck) == [False])
    assert reaper.sweep().recorded == 1
    assert world.rows() == {}
    assert types_told(world.store, run_id)[-1] == "boundary.destroyed"


def test_what_carries_another_installations_mark_at_the_same_site_is_neither_touched_nor_listed(world: World) -> None:
    ours, theirs = world.leave(), world.leave(installation=f"{world.installation[:-1]}x")
    neighbour = replace(world, boundary=NamespaceBoundary(world.site.host("gvisor", installation=theirs.installation)))

    assert [ref.name for ref in world.reaper().sweep().destroyed] == [ours.name]
    world.boundary.destroy(theirs.model_copy(update={"installation": world.installation}))
    assert world.stands(ours, theirs) == [False, True]
    assert world.rows() == {}

    assert [ref.name for ref in neighbour.boundary.discover()] == [theirs.name], "control: it is there to be found"
    neighbour.boundary.destroy(theirs)
    assert world.stands(theirs) == [False]
    assert sweep(neighbour.boundary, world.site.ready) == []


def test_another_namespace_that_has_taken_the_name_meanwhile_is_left_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan, cluster = world.leave(), world.boundary.cluster
    first = (world.admin.get("Namespace", orphan.name) or {})["metadata"]["uid"]
    delete = cluster.delete

    def delete_another(kind: str, name: str, *args: Any, **more: Any) -> None:
        monkeypatch.undo()
        world.admin.delete("Namespace", orphan.name)
        eventually(lambda: world.stands(orphan) == [False])
        world.build(orphan)
        delete(kind, name, *args, **more)

    monkeypatch.setattr(cluster, "delete", delete_another)
    world.boundary.destroy(orphan)

    there = (world.admin.get("Namespace", orphan.name) or {})["metadata"]
    assert there["uid"] != first
    assert "deletionTimestamp" not in there
    world.boundary.destroy(orphan)
    assert world.stands(orphan) == [False], "control: the same call takes it when it is what was looked at"


def test_a_cluster_that_cannot_be_reached_keeps_what_it_had_and_that_is_said(world: World, tmp_path: Path) -> None:
    run_id, fence = world.claimed()
    held = world.leave(run_id=run_id, fence=fence)
    world.reaper().sweep()
    away = tmp_path / "away.kubeconfig"
    away.touch(mode=0o600)
    port = world.site.ready.engine.server.rpartition(":")[2]
    away.write_text(world.site.ready.engine_kubeconfig.read_text().replace(f"{LOOPBACK}:{port}", f"{LOOPBACK}:1"))
    lost = replace(world, boundary=NamespaceBoundary(replace(world.boundary.host, kubeconfig=away)))
    world.lose_workers()

    started = time.monotonic()
    with structlog.testing.capture_logs() as logged:
        swept = lost.reaper(silent_after=timedelta(0)).sweep()
    assert time.monotonic() - started < 20, "a pass is for other kinds as well"

    assert (swept.destroyed, swept.recorded) == ((), 0), "not to be seen is not to be gone"
    assert [ref.name for ref in swept.quarantined] == [held.name]
    assert world.rows()[held.name].state is BoundaryState.QUARANTINED
    assert world.metrics.quarantined._value.get() == 1
    assert types_told(world.store, run_id)[-1] == "boundary.quarantined"
    assert {"cannot list what exists", "cannot be listed; its boundary is quarantined"} <= {
        str(entry["event"]) for entry in logged
    }
    assert [ref.name for ref in world.reaper().sweep().destroyed] == [held.name], "once it answers"
    assert types_told(world.store, run_id)[-1] == "boundary.destroyed"


def test_an_operators_plan_covers_what_the_cluster_has_by_tenant_and_by_run(world: World) -> None:
    run_id, fence = world.claimed()
    live, orphan, anothers = world.leave(run_id=run_id, fence=fence), world.leave(), world.leave(tenant="globex")
    reaper = world.reaper()
    reaper.look()

    def planned(**scope: str) -> CleanupPlan:
        return make_plan(world.store, scope=Scope(**scope), force=True, asked_by="key_1", silent_after=SILENT_AFTER)

    by_run, by_tenant = planned(run=run_id), planned(tenant="acme")
    assert {line.ref.name: line.action for line in by_run.actions} == {live.name: ActionKind.KILL}
    both = {live.name: ActionKind.KILL, orphan.name: ActionKind.DESTROY}
    assert {line.ref.name: line.action for line in by_tenant.actions} == both, "an orphan's label has a hash of it"

    apply_plan(world.store, plan_id=by_tenant.id, who="op", runs=world.store, hints=MemoryHints())
    eventually(lambda: [reaper.obey(), world.store.get_plan(by_tenant.id).done_at][1])
    assert {line.result for line in world.store.get_plan(by_tenant.id).actions} == {"destroyed"}
    assert world.stands(live, orphan, anothers) == [False, False, True]
    world.boundary.destroy(anothers)


def clean_up(world: World, *arguments: str, status: int = 0, **environment: str) -> tuple[dict[str, Any], str]:
    """`blastdoor admin cleanup --local` -> what it printed, and what it complained of."""
    known = {
        "BLASTDOOR_STATE_DIR": str(world.state), "BLASTDOOR_SITE": "here", "BLASTDOOR_KUBE_IMAGE": world.site.image,
        "BLASTDOOR_KUBECONFIG": str(world.site.ready.engine_kubeconfig), "BLASTDOOR_DATABASE_URL": "",
    }  # fmt: skip
    words = ["cleanup-local", "--runtime-dir", str(world.state / "run"), "--json", *arguments]
    before = structlog.get_config()
    try:
        result = CliRunner().invoke(commands, words, env=known | environment)
    finally:
        structlog.configure(**before)
    assert result.exit_code == status, (result.output, result.exception)
    return json.loads(result.stdout) if result.stdout else {}, result.stderr


def test_local_clean_up_covers_them_too_with_the_database_and_without(world: World, tmp_path: Path) -> None:
    orphan, anothers, old = world.leave(), world.leave(tenant="globex"), world.leave(seconds=-60)
    shown, _ = clean_up(world, "--tenant", "acme")
    assert {line["ref"]["name"] for line in shown["actions"]} == {orphan.name, old.name}
    done, _ = clean_up(world, "--run", orphan.run_id, "--apply")
    assert [(line["ref"]["name"], line["result"]) for line in done["actions"]] == [(orphan.name, "destroyed")]

    nowhere = {"BLASTDOOR_STATE_DIR": str(tmp_path / "nowhere")}
    done, said = clean_up(
        world, "--tenant", "acme", "--apply", "--installation", world.installation, **nowhere
    )  # fmt: skip
    assert [(line["ref"]["name"], line["result"]) for line in done["actions"]] == [(old.name, "destroyed")]
    assert world.stands(orphan, old, anothers) == [False, False, True]

    away = tmp_path / "away.kubeconfig"
    away.write_text("{}")
    shown, said = clean_up(world, "--tenant", "globex", status=3, BLASTDOOR_KUBECONFIG=str(away))
    assert shown["actions"] == []
    assert "kind namespace could not be listed" in said
    world.boundary.destroy(anothers)


def test_a_pass_asks_as_often_for_many_as_for_few(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear, in what is listed; the time for 1000 is in the benchmark."""
    reaper, asked = world.reaper(), list[str]()
    ask = Connection.ask

    def counted(self: Connection, method: str, where: str, **more: Any) -> Any:
        asked.append(f"{method} {where}")
        return ask(self, method, where, **more)

    monkeypatch.setattr(Connection, "ask", counted)
    live = []
    took: list[int] = []
    for count in (1, 6):
        while len(live) < count:
            run_id, fence = world.claimed()
            live.append(world.leave(run_id=run_id, fence=fence))
        asked.clear()
        assert reaper.sweep().destroyed == ()
        took.append(len(asked))
        assert len(world.rows()) == count
    assert took[0] == took[1] <= 3, asked
    world.lose_workers()
    assert len(reaper.sweep().destroyed) == len(live), "side by side"
