"""`blastdoor admin cleanup --local`: a real host, with the database and without, and never the API."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from service.adapters.sql_store import SqlStore
from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.ids import new_run_id
from service.core.run import Phase
from tests.contract.store_steps import add_run, add_tenant, bring_to, types_told
from tests.sandboxes import new_installation, require_gvisor, traces
from workers.boundaries.gvisor.places import Places
from workers.cli import commands


class Host:
    """A state directory with a database, and a runtime directory with what workers that are gone have left."""

    def __init__(self, directory: Path) -> None:
        self.state, self.runtime_dir = directory / "state", directory / "run"
        self.state.mkdir()
        self.store = SqlStore(f"sqlite:///{self.state / 'blastdoor.db'}")
        self.store.migrate()
        add_tenant(self.store, concurrent=9)
        self.installation = self.store.installation_id()

    def leave(
        self, *, run_id: str | None = None, fence: int = 1, installation: str | None = None, lives_s: float = 600
    ) -> BoundaryRef:
        """The directory and label that a worker makes first."""
        mark = installation or self.installation
        ref = BoundaryRef(
            installation=mark, kind=BoundaryKind.GVISOR, site="here", tenant="acme", run_id=run_id or new_run_id(),
            fence=fence, expires_at=self.store.now() + timedelta(seconds=lives_s), created_at=self.store.now(),
        )  # fmt: skip
        Places(runtime_dir=self.runtime_dir, installation=mark, site="here").place(ref.name).make(ref)
        return ref

    def stands(self, ref: BoundaryRef) -> bool:
        return any(ref.name in trace for trace in traces(ref.installation, self.runtime_dir))

    def clean_up(self, *arguments: str, status: int = 0, state: Path | None = None) -> dict[str, Any]:
        words = ["cleanup-local", "--state", str(state or self.state), "--runtime-dir", str(self.runtime_dir), "--json"]
        result = CliRunner().invoke(commands, [*words, *arguments])
        assert result.exit_code == status, (result.output, result.exception)
        self.said = result.stderr
        document: dict[str, Any] = json.loads(result.stdout) if result.stdout else {}
        return document


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    require_gvisor()
    for name in ("BLASTDOOR_STATE_DIR", "BLASTDOOR_RUNTIME_DIR", "BLASTDOOR_RUNSC", "BLASTDOOR_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    before = structlog.get_config()
    made = Host(tmp_path)
    yield made
    made.store.close()
    structlog.configure(**before)


def lines(document: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    return {line["ref"]["name"]: (line["action"], line["result"]) for line in document["actions"]}


def test_a_dry_run_shows_what_is_then_done_and_what_is_live_is_refused(host: Host) -> None:
    add_run(host.store)
    held = bring_to(host.store, Phase.RUNNING)
    live, orphan = host.leave(run_id=held.run.id, fence=held.fence), host.leave()

    dry = host.clean_up("--tenant", "acme")
    assert lines(dry) == {live.name: ("refuse", None), orphan.name: ("destroy", None)}
    assert (dry["applied"], dry["database"]) == (False, True)
    assert host.stands(orphan)
    applied = host.clean_up("--tenant", "acme", "--apply", status=1)

    assert lines(applied) == {live.name: ("refuse", "refused"), orphan.name: ("destroy", "destroyed")}
    assert (host.stands(live), host.stands(orphan)) == (True, False)
    (entry,) = host.store.list_acts(limit=10, before=None)[0]
    assert (entry.what, entry.who.split(":")[0]) == ("cleanup.local", "local")


def test_with_force_the_run_is_the_operators_to_end_and_it_is_recorded_as_gone(host: Host) -> None:
    add_run(host.store)
    held = bring_to(host.store, Phase.RUNNING)
    live = host.leave(run_id=held.run.id, fence=held.fence)

    assert lines(host.clean_up("--run", held.run.id, "--force", "--apply")) == {live.name: ("kill", "destroyed")}

    assert not host.stands(live)
    assert host.store.look(held.run.id, held.fence).cancel_requested_by == "operator"
    assert types_told(host.store, held.run.id)[-1] == "boundary.destroyed"


def test_without_the_database_it_says_so_and_takes_for_live_what_has_not_outlived_its_time(
    host: Host, tmp_path: Path
) -> None:
    young, old = host.leave(), host.leave(lives_s=-60)
    nowhere = tmp_path / "nowhere"

    host.clean_up("--orphans", state=nowhere, status=2)
    assert host.installation in host.said, "it lists whose boundaries are here"
    applied = host.clean_up("--tenant", "acme", "--apply", "--installation", host.installation, state=nowhere, status=1)

    assert "cannot be reached" in host.said
    assert applied["database"] is False
    assert lines(applied) == {young.name: ("refuse", "refused"), old.name: ("destroy", "destroyed")}
    assert (host.stands(young), host.stands(old)) == (True, False)
    assert not nowhere.exists(), "a database that is not there is not made"
    forced = host.clean_up(
        "--boundary", young.name, "--apply", "--force", "--installation", host.installation, state=nowhere
    )
    assert lines(forced) == {young.name: ("kill", "destroyed")}
    assert not host.stands(young)


def test_what_another_installation_has_here_is_not_even_listed(host: Host) -> None:
    foreign, ours = host.leave(installation=new_installation(), lives_s=-60), host.leave(lives_s=-60)

    assert lines(host.clean_up("--older-than", "0", "--apply", "--force")) == {ours.name: ("destroy", "destroyed")}
    assert (host.stands(foreign), host.stands(ours)) == (True, False)


def test_a_scope_that_says_nothing_is_bad_usage(host: Host) -> None:
    ours = host.leave(lives_s=-60)

    host.clean_up("--apply", "--force", status=2)
    assert host.stands(ours)
