"""The engine cannot saturate an API server that it shares: it fills its own share, waits, is sent away, and nobody else
is. Shown under a load that is more than the share."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.engines import CHOICES, Ready, ready
from tests.cluster.lab.client import connect
from tests.cluster.pods import WITHIN_S, eventually
from workers.kube import Cluster, Manifest, Unreachable
from workers.kube.install import wanted

__all__ = ["ready"]
LEVEL, SCHEMA = "PriorityLevelConfiguration", "FlowSchema"
NEIGHBOUR = "neighbour"
CALLERS = 48
NEIGHBOURS_CALLS = 40
TOO_MANY = 429


@pytest.fixture
def narrow(ready: Ready) -> Iterator[None]:
    """The engine's share made so small that what a test can do from one process is more than it."""
    level = next(one for one in wanted(CHOICES) if one["kind"] == LEVEL)
    queuing = {"queues": 1, "handSize": 1, "queueLengthLimit": 1}
    limited = {
        "nominalConcurrencyShares": 1, "lendablePercent": 0, "borrowingLimitPercent": 0,
        "limitResponse": {"type": "Queue", "queuing": queuing},
    }  # fmt: skip
    before = seats(ready)["blastdoor-engine"]
    ready.admin.apply(level | {"spec": {"type": "Limited", "limited": limited}})
    try:
        eventually(lambda: seats(ready)["blastdoor-engine"] < before)
        yield
    finally:
        ready.admin.apply(level)
        eventually(lambda: seats(ready)["blastdoor-engine"] == before)


def metrics(ready: Ready, name: str) -> dict[str, float]:
    """Of the API server, summed by priority level."""
    with connect(ready.kubeconfig) as client:
        text = client.get("/metrics").raise_for_status().text
    found: dict[str, float] = {}
    for labels, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE):
        level = re.search(r'priority_level="([^"]*)"', labels)
        if level:
            found[level[1]] = found.get(level[1], 0) + float(value)
    return found


def seats(ready: Ready) -> dict[str, float]:
    return metrics(ready, "apiserver_flowcontrol_nominal_limit_seats")


@contextmanager
def flood(cluster: Callable[[], Cluster]) -> Iterator[list[str]]:
    """Many callers at once, each without a pause -> a list that grows by how each call went."""
    stop, history = threading.Event(), list[str]()

    def call() -> None:
        mine = cluster()
        while not stop.is_set():
            try:
                mine.list("Pod")
                history.append("served")
            except Unreachable as error:
                history.append("sent away" if error.status == TOO_MANY else str(error))
        mine.close()

    threads = [threading.Thread(target=call) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        yield history
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_the_engines_share_is_a_small_one(ready: Ready) -> None:
    shares = seats(ready)
    assert 0 < shares["blastdoor-engine"] < sum(shares.values()) / 10


def test_an_engine_that_asks_too_much_is_sent_away_and_its_neighbour_is_not(ready: Ready, narrow: None) -> None:
    neighbour = Cluster.from_kubeconfig(ready.kubeconfig, patience_s=0, acting_as=NEIGHBOUR)
    with flood(lambda: Cluster.from_kubeconfig(ready.engine_kubeconfig, patience_s=0)) as history:
        eventually(lambda: "sent away" in history and "served" in history)
        for _ in range(NEIGHBOURS_CALLS):
            neighbour.raw("GET", "/api")  # raises if it is sent away
        assert "sent away" in history[-10 * CALLERS :]  # the load was there all the time
        assert set(history) == {"served", "sent away"}
    neighbour.close()
    rejected = metrics(ready, "apiserver_flowcontrol_rejected_requests_total")
    assert rejected["blastdoor-engine"] > 0
    assert {level for level, number in rejected.items() if number} == {"blastdoor-engine"}


@pytest.fixture
def neighbour_within(ready: Ready) -> Iterator[None]:
    """As it would be without a share of the engine's own: whoever it is that asks, there is one for both."""
    schema = next(one for one in wanted(CHOICES) if one["kind"] == SCHEMA)
    rule = schema["spec"]["rules"][0] | {"subjects": [{"kind": "User", "user": {"name": NEIGHBOUR}}]}
    spec = schema["spec"] | {"matchingPrecedence": 899, "rules": [rule]}
    made = ready.admin.apply(schema | {"metadata": {"name": "neighbour"}, "spec": spec})
    neighbour = Cluster.from_kubeconfig(ready.kubeconfig, patience_s=0, acting_as=NEIGHBOUR)

    def counted_under() -> str:
        headers = neighbour.raw("GET", "/api").headers
        return {key.lower(): value for key, value in headers.items()}["x-kubernetes-pf-flowschema-uid"]

    try:
        eventually(lambda: counted_under() == made["metadata"]["uid"])
        yield
    finally:
        ready.admin.delete(SCHEMA, "neighbour")
        eventually(lambda: counted_under() != made["metadata"]["uid"])
        neighbour.close()


def _status(caller: Cluster) -> int | None:
    """Of one refusal."""
    try:
        caller.raw("GET", "/api")
    except Unreachable as error:
        return error.status
    return None


def test_a_neighbour_without_a_share_apart_from_the_engines_is_sent_away(
    ready: Ready, neighbour_within: None, narrow: None
) -> None:
    """The control: the same load, the same calls."""
    neighbour = Cluster.from_kubeconfig(ready.kubeconfig, patience_s=0, acting_as=NEIGHBOUR)
    with flood(lambda: Cluster.from_kubeconfig(ready.engine_kubeconfig, patience_s=0)) as history:
        eventually(lambda: "sent away" in history and "served" in history)
        statuses = [_status(neighbour) for _ in range(NEIGHBOURS_CALLS)]
    assert TOO_MANY in statuses
    assert set(statuses) <= {TOO_MANY, None}
    neighbour.close()


def test_an_engine_that_was_sent_away_goes_on_when_there_is_room(ready: Ready, narrow: None) -> None:
    """With patience, which a worker has, nothing is lost by it."""
    patient = Cluster.from_kubeconfig(ready.engine_kubeconfig)
    found: list[Manifest] = []
    asking = threading.Thread(target=lambda: found.extend(patient.list("Node")))
    with flood(lambda: Cluster.from_kubeconfig(ready.engine_kubeconfig, patience_s=0)) as history:
        eventually(lambda: "sent away" in history)
        asking.start()
    asking.join(WITHIN_S)
    assert found
    patient.close()
