"""Nobody goes into a sandbox but the engine, and by exec alone: tried with a pod that runs, by the cluster's own
administrator, to whom everything is allowed that admission lets through.

The control of each is the same request about a pod in a namespace that is none of ours: there it is let in.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest

from tests.cluster.engines import Ready
from tests.cluster.lab.client import connect
from tests.cluster.lab.images import BUSYBOX
from tests.cluster.namespaces import NamespaceKind, Site, sweep
from tests.cluster.pods import Namespace, namespace, pod
from tests.sandboxes import Never, make_spec, shell
from workers.boundaries.namespace.driver import NamespaceBoundary
from workers.kube import ClusterError, Denied, ExecEnded
from workers.pods.render import namespace_name

REFUSED = "interactive: nobody goes into a sandbox"
INSIDE = ("/exec?command=id&stdout=true", "/attach?stdout=true", "/portforward?ports=8080", ":8080/proxy/")


@dataclass(frozen=True)
class Room:
    """A pod that runs, ours or an ordinary one."""

    namespace: str
    pod: str
    container: str

    @property
    def path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods/{self.pod}"


@pytest.fixture(scope="module")
def boundary(site: Site) -> Iterator[NamespaceBoundary]:
    boundary = NamespaceBoundary(site.host())
    yield boundary
    assert sweep(boundary, site.ready) == []


@pytest.fixture(scope="module", params=["runc", "gvisor"])
def sandbox(request: pytest.FixtureRequest, boundary: NamespaceBoundary) -> Iterator[Room]:
    ref = NamespaceKind(boundary, request.param).ref()
    with boundary.open(make_spec(), ref, cancelled=Never()) as opened:
        yield Room(namespace_name(ref), ref.name, "run")
        assert opened.execute(shell("exit 7")).exit_code == 7, "the engine's own way in, after all that was tried"
    boundary.destroy(ref)


@pytest.fixture(scope="module")
def ordinary(site: Site) -> Iterator[Room]:
    if site.lab is None:
        pytest.skip("its image is the lab's")
    with (
        connect(site.ready.kubeconfig) as client,
        namespace(client, f"ordinary-{secrets.token_hex(4)}") as room,
    ):
        _running(room, pod("open", "httpd -f -p 8080 & sleep 600"))
        yield Room(room.name, "open", "main")


def _running(room: Namespace, manifest: dict[str, object]) -> None:
    room.start(manifest)
    room.in_phase("open", "Running")


@contextmanager
def refused() -> Iterator[None]:
    with pytest.raises(Denied, match=REFUSED):
        yield


def executed(ready: Ready, room: Room, *, by_engine: bool) -> ExecEnded:
    cluster = ready.engine if by_engine else ready.admin
    return cluster.exec_(
        room.namespace, room.pod, room.container, ["/bin/sh", "-c", "exit 5"],
        on_output=lambda *_: None, deadline=time.monotonic() + 30,
    )  # fmt: skip


def test_exec_is_the_engines_alone(site: Site, sandbox: Room, ordinary: Room) -> None:
    assert executed(site.ready, sandbox, by_engine=True).exit_code == 5
    with refused():
        executed(site.ready, sandbox, by_engine=False)
    assert executed(site.ready, ordinary, by_engine=False).exit_code == 5, "control"
    with pytest.raises(Denied, match="engine: it acts in its own namespaces only"):
        executed(site.ready, ordinary, by_engine=True)


@pytest.mark.parametrize("way", INSIDE, ids=lambda way: way.partition("?")[0].strip("/"))
def test_no_way_in_is_open_to_an_administrator(site: Site, sandbox: Room, ordinary: Room, way: str) -> None:
    """Without an upgrade none of these begins; whether admission lets it come so far is what is asked."""
    for method in ("GET", "POST"):
        with refused():
            site.ready.admin.raw(method, f"{sandbox.path}{way}")
        assert REFUSED not in answer(lambda: site.ready.admin.raw(method, f"{ordinary.path}{way}")), "control"  # noqa: B023


def answer(ask: Callable[[], object]) -> str:
    """What the API server says against it; empty when it does it."""
    try:
        ask()
    except ClusterError as error:
        return error.detail
    return ""


def test_no_container_is_added_to_a_sandbox_for_debugging(site: Site, sandbox: Room, ordinary: Room) -> None:
    def add(room: Room) -> object:
        live = site.ready.admin.get("Pod", room.pod, room.namespace)
        assert live is not None
        extra = {"name": "debug", "image": BUSYBOX, "targetContainerName": room.container}
        extra |= {"securityContext": live["spec"]["containers"][0]["securityContext"]}
        changed = live | {"spec": live["spec"] | {"ephemeralContainers": [extra]}}
        return site.ready.admin.raw("PUT", f"{room.path}/ephemeralcontainers?dryRun=All", body=changed)

    with pytest.raises(Denied, match=r"(interactive|one-container): "):
        add(sandbox)
    assert answer(lambda: add(ordinary)) == "", "control"


def test_its_limits_are_not_raised_while_it_runs(site: Site, sandbox: Room) -> None:
    live = site.ready.admin.get("Pod", sandbox.pod, sandbox.namespace)
    assert live is not None
    with refused():
        site.ready.admin.raw("PUT", f"{sandbox.path}/resize?dryRun=All", body=live)


def test_control_the_administrator_may_read_both(site: Site, sandbox: Room, ordinary: Room) -> None:
    """It is not that this user may do nothing."""
    with connect(site.ready.kubeconfig) as client:
        for room in (sandbox, ordinary):
            assert client.get(room.path).status_code == httpx.codes.OK
