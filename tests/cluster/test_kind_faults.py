"""What breaks while kind makes a cluster leaves nothing, and standby clusters are each used once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from service.core.errors import NotYetDestroyed, ProvisionFailed
from tests.cluster.engine.outside import Engine
from tests.cluster.kind_ground import (
    INSTALLATION,
    Flag,
    elsewhere,
    engine,
    kinds,
    left,
    makers,
    provisioner_of,
    ref_of,
    wait_until,
)
from workers.boundaries.cluster.engine import EngineFailed
from workers.boundaries.cluster.kind import KindProvisioner
from workers.boundaries.cluster.kind_render import STANDBY, network_name
from workers.boundaries.cluster.standby import Standby

__all__ = ["engine", "kinds"]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_cancelled_while_it_is_made_it_leaves_nothing(kinds: KindProvisioner, engine: Engine) -> None:
    cancelled, seen = Flag(), list[int]()

    def tell(step: str) -> None:
        if step == "starting control-plane":
            seen.append(len(left(engine, kinds)))
            cancelled.up = True

    with pytest.raises(ProvisionFailed, match="cancelled while"):
        kinds.create(ref_of(), cancelled=cancelled, tell=tell)
    assert seen[0] >= 5, "the control: container, volume, network, directory and processes were there"
    assert left(engine, kinds) == []


def test_kind_killed_half_way_leaves_nothing(kinds: KindProvisioner, engine: Engine) -> None:
    ref = ref_of()

    def tell(step: str) -> None:
        if step == "preparing nodes":
            threading.Timer(1.0, kill_kind).start()

    def kill_kind() -> None:
        wanted = [pid for pid in makers() if Path(f"/proc/{pid}/comm").read_text().strip() == "kind"]
        for pid in wanted:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ProvisionFailed, match="kind did not make the cluster"):
        kinds.create(ref, cancelled=Flag(), tell=tell)
    nothing_stays(kinds, engine)


def nothing_stays(kinds: KindProvisioner, engine: Engine) -> None:
    """What the engine was still about to do for a dead client may come late: then it is discovered, and ended."""

    def reaped() -> bool:
        for ref in kinds.discover():
            with suppress(NotYetDestroyed):
                kinds.destroy(ref)
        return left(engine, kinds) == []

    wait_until(reaped)
    time.sleep(3)
    wait_until(reaped)


def test_a_worker_killed_while_it_makes_one_leaves_what_another_process_ends(
    kinds: KindProvisioner, engine: Engine, tmp_path: Path
) -> None:
    ref, told = ref_of(), tmp_path / "told"
    program = (
        "class Never:\n    def is_set(self): return False\n"
        f"def tell(step): Path({str(told)!r}).open('a').write(step + '\\n')\n"
        "there.create(ref, cancelled=Never(), tell=tell)"
    )
    worker = threading.Thread(target=lambda: _ignore(lambda: elsewhere(kinds, program, ref)))
    worker.start()
    wait_until(lambda: told.exists() and "writing configuration" in told.read_text(), within_s=120)
    (pid,) = (int(one.parent.name) for one in Path("/proc").glob("[0-9]*/cmdline") if _is(one, ref.run_id, "-c"))
    os.kill(pid, signal.SIGKILL)
    worker.join()
    assert makers(), "the control: kind goes on without its worker"
    assert [one.name for one in kinds.discover()] == [ref.name]
    kinds.destroy(ref)
    nothing_stays(kinds, engine)


def _is(cmdline: Path, *words: str) -> bool:
    try:
        said = cmdline.read_text()
    except OSError:
        return False
    return all(word in said for word in words)


def _ignore(act: Callable[[], object]) -> None:
    with suppress(AssertionError):  # it was killed
        act()


def test_while_the_engine_stands_still_nothing_is_called_absent_and_afterwards_nothing_is_left(
    kinds: KindProvisioner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.boundaries.cluster.engine._ANSWER_S", 3.0)
    cancelled, ref = Flag(), ref_of()

    def tell(step: str) -> None:
        if step == "writing configuration":
            os.kill(dockerd(engine), signal.SIGSTOP)
            cancelled.up = True

    try:
        with pytest.raises(ProvisionFailed, match="cancelled while"):
            kinds.create(ref, cancelled=cancelled, tell=tell)
        assert makers() == [], "what made it was ended, with or without the engine"
        assert kinds.lacks() != ()
        with pytest.raises(EngineFailed, match="did not end within"):
            list(kinds.discover())
        with pytest.raises(NotYetDestroyed, match="did not end within"):
            kinds.destroy(ref)
    finally:
        os.kill(dockerd(engine), signal.SIGCONT)
    assert [one.name for one in kinds.discover()] == [ref.name]
    kinds.destroy(ref)
    assert left(engine, kinds) == []


def dockerd(engine: Engine) -> int:
    """As this machine calls it."""
    wanted = f"--data-root={engine.state}/data"
    (pid,) = (int(one.parent.name) for one in Path("/proc").glob("[0-9]*/cmdline") if _is(one, "dockerd", wanted))
    return pid


def test_an_engine_that_is_away_is_not_one_that_has_nothing(kinds: KindProvisioner, engine: Engine) -> None:
    away = provisioner_of(engine, kinds.host.state, docker_host=f"{engine.docker_host}.away")
    (said,) = away.lacks()
    assert "a container engine that answers" in said
    with pytest.raises(EngineFailed):
        list(away.discover())
    with pytest.raises(ProvisionFailed, match="start it"):
        away.create(ref_of(), cancelled=Flag(), tell=print)
    away._resisted.add((ref := ref_of()).name)  # it does not try for long then
    with pytest.raises(NotYetDestroyed, match="the engine at"):
        away.destroy(ref)


def test_an_image_that_the_engine_does_not_have_is_not_fetched(kinds: KindProvisioner, engine: Engine) -> None:
    without = provisioner_of(engine, kinds.host.state, node_image="kindest/node:v1.36.2")
    assert "build or load it there first" in without.lacks()[0]
    with pytest.raises(ProvisionFailed, match="build or load it there first"):
        without.create(ref_of(), cancelled=Flag(), tell=print)
    assert left(engine, kinds) == []


# --- Standby ----------------------------------------------------------------------------------------------------------


def test_a_standby_cluster_is_made_claimed_by_one_process_and_ended_with_its_run(
    kinds: KindProvisioner, engine: Engine
) -> None:
    prepared: list[Path] = []
    standby = Standby(kinds, wanted=1, prepare=lambda kubeconfig, _: prepared.append(kubeconfig))
    standby.keep(cancelled=Flag())
    standing = standby.standing()
    assert (standing.ready, standing.failed) == (1, 0)
    (unclaimed,) = kinds.discover()
    assert (unclaimed.tenant, unclaimed.fence) == (STANDBY, 0)
    program = (
        "from workers.boundaries.cluster.standby import Standby\n"
        "found = Standby(there, wanted=1, prepare=print).claim(ref)\n"
        "print(json.dumps(found and str(found)))"
    )
    runs, got = [ref_of(), ref_of()], dict[str, Any]()
    racing = [
        threading.Thread(target=lambda run=run: got.__setitem__(run.name, elsewhere(kinds, program, run)))
        for run in runs
    ]
    for thread in racing:
        thread.start()
    for thread in racing:
        thread.join()
    (winner,) = (run for run in runs if got[run.name])
    assert got[winner.name] == str(prepared[0])
    assert kinds.answers(prepared[0])
    assert list(kinds.discover()) == [winner], "it is the run's, by its whole reference"
    kinds.destroy(unclaimed)
    assert kinds.answers(prepared[0]), "under its old name it is nobody's to end"
    assert [standby.standing().claimed, standby.standing().ready] == [1, 0]
    _lose_network_and_directory(kinds, engine, unclaimed.name)
    (lost,) = kinds.discover()
    assert (lost.name, lost.tenant) == (unclaimed.name, ""), "a container still says whose it was"
    kinds.destroy(lost)
    assert left(engine, kinds) == []


def _lose_network_and_directory(kinds: KindProvisioner, engine: Engine, name: str) -> None:
    network = network_name(name, INSTALLATION)
    engine.run(engine.docker, "network", "disconnect", "--force", network, f"{name}-control-plane")
    engine.run(engine.docker, "network", "rm", network)
    kinds.places.place(name).remove()
