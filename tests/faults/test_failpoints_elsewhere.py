"""The failpoints of the API, the relay, the webhooks' process and the reaper, with each action: a client that insists,
and a second process, make it as if nothing had been."""

import json
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from service.adapters.sealing import FernetBox
from service.core.events import EventType
from service.core.failpoints import Action, Failpoint
from service.core.run import Phase
from service.core.tenancy import KeyKind
from service.core.webhooks.models import Owner
from service.usecases.keys import mint
from service.usecases.webhooks import create_webhook
from tests.faults.clients import Clients
from tests.faults.place import Forks, Place, Program, eventually, is_up
from tests.faults.recorder import as_judged
from tests.faults.scene import Scene, open_scene
from tests.faults.test_failpoints import LINE
from tests.receivers import Receiver, receiving
from tests.servers import LOOPBACK, _free_port

SUBMIT = [Failpoint.SUBMIT_BEFORE_COMMIT, Failpoint.SUBMIT_AFTER_COMMIT, Failpoint.SUBMIT_BEFORE_RING]
RELAY = [Failpoint.RELAY_STAMPED, Failpoint.RELAY_ADDED]
REAPER = [Failpoint.REAPER_BEFORE_DESTROY, Failpoint.REAPER_DESTROYED]
HOOKS = [Failpoint.HOOK_CLAIMED, Failpoint.HOOK_SENT]

pytestmark = pytest.mark.timeout(240)


def test_no_failpoint_is_forgotten() -> None:
    covered = [*LINE, *SUBMIT, *RELAY, *REAPER, *HOOKS]

    assert len(covered) == len(set(covered))
    assert set(covered) == set(Failpoint)


def reached(program: Program, place: Place) -> None:
    eventually(lambda: program.events("failpoint_reached"), why=place.told)


def armed(point: Failpoint, action: Action) -> dict[str, str]:
    return {"BLASTDOOR_FAILPOINTS": f"{point}:{action}@1"}


def cancelled_runs(scene: Scene, count: int) -> None:
    """Runs that need no worker to have an end to tell of."""
    for _ in range(count):
        scene.place.store.request_cancel(scene.submit(rings=0), None, by="tenant")


# --- the relay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("point", RELAY)
def test_a_relay_that_fails_in_between_tells_each_event_once(
    forks: Forks, tmp_path: Path, point: Failpoint, action: Action
) -> None:
    with open_scene(forks, tmp_path) as scene:
        place = scene.place
        cancelled_runs(scene, 5)
        first = place.start("relay", **armed(point, action))
        reached(first, place)
        if action is not Action.STOP:
            eventually(lambda: not first.running, why=place.told)
        assert not place.settled(), "the control: what it was at is not over"
        assert scene.wrong_so_far() == ({"I3"} if point is Failpoint.RELAY_STAMPED else set())

        place.start("relay")  # as a supervisor does, or a standby that takes the lease over
        eventually(place.settled, why=place.told)
        first.send(signal.SIGCONT)
        cancelled_runs(scene, 1)

        assert scene.judged() == []


# --- webhooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("point", HOOKS)
def test_a_delivery_whose_process_fails_is_made_again_under_the_same_id(
    forks: Forks, tmp_path: Path, point: Failpoint, action: Action
) -> None:
    key = Fernet.generate_key().decode()
    with receiving() as receiver, open_scene(forks, tmp_path) as scene:
        place = scene.place
        owner, box = Owner(tenant="acme"), FernetBox([key])
        create_webhook(place.store, box, owner=owner, url=receiver.url, types=[EventType.FINISHED])
        scene.recorder.add("endpoint", receiver="acme")
        place.start("relay")
        cancelled_runs(scene, 3)
        hooks = {"BLASTDOOR_SECRETS_KEY": key, "BLASTDOOR_WEBHOOK_ALLOW": receiver.pair}
        first = place.start("webhooks", **hooks, **armed(point, action))
        reached(first, place)

        outlives_it = point is Failpoint.HOOK_SENT and action is Action.RAISE  # one delivery failed: it is tried again
        if action is Action.EXIT or (action is Action.RAISE and not outlives_it):
            eventually(lambda: not first.running, why=place.told)
        if not outlives_it:
            assert place.store.delivery_counts()[0], "the control: what it had begun is not over"
            place.start("webhooks", **hooks)
        eventually(lambda: place.store.delivery_counts() == (0, 0) and len(_told(receiver)) == 3, why=place.told)
        first.send(signal.SIGCONT)

        for hit in receiver.hits:
            scene.recorder.add("webhook", receiver="acme", **as_judged(json.loads(hit.body)))
        assert scene.judged() == []


def _told(receiver: Receiver) -> set[str]:
    return {hit.headers["webhook-id"] for hit in receiver.hits}


# --- reapers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reaped(forks: Forks) -> Iterator[list[str]]:
    """Six sites, each with the boundary of a worker that is no more, and a reaper that fails over it."""
    with (
        tempfile.TemporaryDirectory(prefix="bd-reap-") as directory,
        open_scene(forks, Path(directory)) as scene,
    ):
        place = scene.place
        place.start("relay")
        cases = [(point, action) for point in REAPER for action in Action]

        def play(n: int) -> None:
            site, (point, action) = f"site{n}", cases[n]
            first = place.start("reaper", site=site, **armed(point, action))
            reached(first, place)
            if action is not Action.RAISE:  # there it outlives the failure by itself
                place.start("reaper", site=site)
            assert scene.ended(runs[n]) == ("errored", "worker_lost", 1)
            first.send(signal.SIGCONT)

        runs = [scene.abandon(Phase.RUNNING, site=f"site{n}") for n in range(len(cases))]
        assert len(place.left(within_s=0)) == len(cases), "the control: they stand, and that shows"
        with ThreadPoolExecutor(len(cases)) as pool:
            list(pool.map(play, range(len(cases))))
        yield scene.judged()


def test_a_reaper_that_fails_over_a_boundary_is_followed_by_the_next_look(reaped: list[str]) -> None:
    assert reaped == []


# --- the API ---------------------------------------------------------------------------------------------------------


def test_a_client_that_insists_has_its_run_once(forks: Forks) -> None:
    """With the same Idempotency-Key, through an API that died, hung or failed while it accepted the run."""
    cases = [(point, action) for point in SUBMIT for action in Action]
    with (
        tempfile.TemporaryDirectory(prefix="bd-api-") as directory,
        open_scene(forks, Path(directory)) as scene,
    ):
        place = scene.place
        for role in ("relay", "reaper", "worker"):
            place.start(role, BLASTDOOR_WORKER_CONCURRENCY="2")
        key = mint(place.store, kind=KeyKind.TENANT, tenant="acme").key
        eventually(lambda: place.query("SELECT id FROM worker"), why=place.told)

        def play(n: int) -> None:
            point, action = cases[n]
            port = _free_port()
            more = {"BLASTDOOR_PORT": str(port), "BLASTDOOR_UPLOAD_DEADLINE_S": "2"}
            fails = place.start("api", **more, **armed(point, action))
            url = f"http://{LOOPBACK}:{port}"
            eventually(lambda: is_up(url), why=place.told)
            clients = Clients(url, {"acme": key}, scene.recorder, seed=n)
            with ThreadPoolExecutor(1) as asking:
                told = asking.submit(clients.submit, "acme", key=f"key-{n}", token=f"token-{n:012x}")
                reached(fails, place)
                if action is Action.EXIT:
                    eventually(lambda: not fails.running, why=place.told)
                    place.start("api", **more)
                elif action is Action.STOP:
                    time.sleep(1.0)
                    assert not told.done(), "the control: it is this API that it waits for"
                    fails.send(signal.SIGCONT)
                assert told.result(60)
            clients.close()

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(play, range(len(cases))))

        assert scene.judged() == []
        assert len([row for row in place.rows() if row["tenant"] == "acme"]) == len(cases)
        assert {row["outcome"] for row in place.rows()} == {"passed"}
