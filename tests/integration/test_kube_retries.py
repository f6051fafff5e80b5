"""An API server that fails in every way it can: before it has done what it was asked, and after. A stand-in, since a
real one does not fail on demand; what it keeps is a set of objects, by path."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from kubernetes import client

from service.core.boundary import BoundaryKind
from tests.sandboxes import make_ref, make_spec
from workers.kube import Cluster, ClusterError, Denied, Manifest, Taken, Unreachable, connection
from workers.pods.listener import create
from workers.pods.render import render_namespace, render_pod

POD: Manifest = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "run", "namespace": "bd", "labels": {"run": "1", "fence": "1"}},
}
PATH = "/api/v1/namespaces/bd/pods"
Fault = Callable[["Handler", bool], None]


class _Cut(Exception):
    """The end of a connection, and of what would have been answered on it."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Manifest] = {}
        self.asked: list[str] = []
        self.faults: list[tuple[str, Fault]] = []
        """Method, and what happens to the next request of it; one each."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], _Cut):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: Manifest, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def play(self) -> None:
        path = self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        self.server.asked.append(self.command)
        fault = next((one for one in self.server.faults if one[0] == self.command), None)
        if fault is not None:
            self.server.faults.remove(fault)
            fault[1](self, False)
        status, answer = self._apply(path, body)
        if fault is not None:
            fault[1](self, True)
            if self.close_connection:
                return
        self.answer(status, answer)

    do_GET = do_POST = do_PATCH = do_DELETE = play  # noqa: N815

    def _apply(self, path: str, body: Manifest) -> tuple[int, Manifest]:
        objects = self.server.objects
        match self.command:
            case "POST":
                there = f"{path}/{body['metadata']['name']}"
                if there in objects:
                    return 409, {"reason": "AlreadyExists", "message": f"{there} already exists"}
                objects[there] = body | {"metadata": body["metadata"] | {"uid": str(len(self.server.asked))}}
                return 201, objects[there]
            case "PATCH":
                objects[path] = body
                return 200, body
            case "DELETE":
                found = objects.get(path)
                if found is None:
                    return 404, {"reason": "NotFound", "message": "not found"}
                if (body.get("preconditions") or {}).get("uid", found["metadata"]["uid"]) != found["metadata"]["uid"]:
                    return 409, {"reason": "Conflict", "message": "another uid"}
                return 200, objects.pop(path)
        return (200, objects[path]) if path in objects else (404, {"reason": "NotFound", "message": "not found"})


def says_nonsense(handler: Handler, done: bool) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "4")
    handler.end_headers()
    handler.wfile.write(b"<ht>")
    raise _Cut


def refuses(status: int, *, reason: str = "Broken", message: str = "not now", **headers: str) -> Fault:
    """Answers at once, and does nothing."""

    def fault(handler: Handler, done: bool) -> None:
        if not done:
            handler.answer(status, {"reason": reason, "message": message}, **headers)
            raise _Cut

    return fault


def does_and_answers(status: int) -> Fault:
    """Does what it was asked, and says that it did not."""

    def fault(handler: Handler, done: bool) -> None:
        if done:
            handler.answer(status, {"reason": "Timeout", "message": "it may have been done"})
            raise _Cut

    return fault


def hangs_up(after: bool) -> Fault:
    """Ends the connection without an answer, before or after doing it."""

    def fault(handler: Handler, done: bool) -> None:
        if done is after:
            raise _Cut

    return fault


def hangs(handler: Handler, done: bool) -> None:
    """Does it, and says nothing for as long as anybody waits."""
    if done:
        handler.connection.settimeout(20)
        with suppress(OSError):
            handler.connection.recv(1)  # the client hangs up first
        raise _Cut


FAULTS = {
    "429 before": refuses(429, Retry_After="0"),
    "500 before": refuses(500),
    "503 before": refuses(503),
    "cut before": hangs_up(after=False),
    "500 after": does_and_answers(500),
    "504 after": does_and_answers(504),
    "cut after": hangs_up(after=True),
    "time-out after": hangs,
}


def _things_of_a_run() -> dict[str, Manifest]:
    """All that the driver makes, by kind and name, in its order: the namespace, its walls, the pod."""
    ref = make_ref(installation="inst0", run_id="run_" + "0" * 31 + "1")
    ref = ref.model_copy(update={"kind": BoundaryKind.NAMESPACE, "variant": "gvisor"})
    pod = render_pod(ref, make_spec(), image="x@sha256:" + "0" * 64, words=["first", "10.0.0.7", "4711"], seconds=60)
    things = [*render_namespace(ref, make_spec()), pod]
    return {f"{one['kind']} {one['metadata']['name']}": one for one in things}


THINGS = _things_of_a_run()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is long enough to wait for an answer that never comes."""
    monkeypatch.setattr(connection, "ANSWER_S", 1.0)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cluster(server: Server) -> Iterator[Cluster]:
    cluster = _cluster(server, patience_s=20)
    yield cluster
    cluster.close()


def _cluster(server: Server, *, patience_s: float) -> Cluster:
    configuration = client.Configuration(host=f"http://127.0.0.1:{server.server_address[1]}")
    return Cluster(configuration, patience_s=patience_s)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pod_is_made_once_whatever_happens_to_the_answer(server: Server, cluster: Cluster, fault: str) -> None:
    server.faults.append(("POST", FAULTS[fault]))
    made = cluster.create(POD, ours=POD["metadata"]["labels"])
    assert server.asked.count("POST") == 2
    assert list(server.objects) == [f"{PATH}/run"]
    assert made["metadata"]["uid"] == server.objects[f"{PATH}/run"]["metadata"]["uid"]


def test_a_pod_of_an_older_fence_is_not_taken_for_ours(server: Server, cluster: Cluster) -> None:
    cluster.create(POD)
    with pytest.raises(Taken):
        cluster.create(POD, ours={"run": "1", "fence": "2"})


def test_two_that_are_counted_against_a_quota_at_once_are_both_made(server: Server, cluster: Cluster) -> None:
    server.faults.append(("POST", refuses(409, reason="Conflict")))
    cluster.create(POD, ours=POD["metadata"]["labels"])
    assert list(server.objects) == [f"{PATH}/run"]


def test_a_pod_waits_for_the_quota_of_its_namespace_to_be_counted_and_for_no_other_refusal(
    server: Server, cluster: Cluster
) -> None:
    uncounted = 'pods "run" is forbidden: status unknown for quota: ceiling, resources: pods'  # Kubernetes 1.36
    server.faults += [("POST", refuses(403, reason="Forbidden", message=uncounted))] * 3
    assert create(cluster, POD)["metadata"]["uid"] == server.objects[f"{PATH}/run"]["metadata"]["uid"]
    assert server.asked.count("POST") == 4

    server.faults.append(("POST", refuses(403, reason="Forbidden", message="exceeded quota: ceiling")))
    with pytest.raises(Denied, match="exceeded"):
        create(cluster, POD)
    assert server.asked.count("POST") == 5


def test_an_answer_that_is_no_json_is_an_error(server: Server, cluster: Cluster) -> None:
    server.faults.append(("GET", says_nonsense))
    with pytest.raises(ClusterError, match="no JSON"):
        cluster.get("Pod", "run", "bd")


def test_what_is_in_our_way_and_gone_when_we_look_is_an_error_and_no_object(server: Server, cluster: Cluster) -> None:
    cluster.create(POD)
    server.faults.append(("GET", refuses(404)))
    with pytest.raises(Taken):
        cluster.create(POD, ours=POD["metadata"]["labels"])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_manifest_is_applied_whatever_happens_to_the_answer(server: Server, cluster: Cluster, fault: str) -> None:
    server.faults.append(("PATCH", FAULTS[fault]))
    cluster.apply(POD)
    assert server.objects == {f"{PATH}/run": POD}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_deleted_is_gone_whatever_happens_to_the_answer(server: Server, cluster: Cluster, fault: str) -> None:
    uid = cluster.create(POD)["metadata"]["uid"]
    server.faults.append(("DELETE", FAULTS[fault]))
    cluster.delete("Pod", "run", "bd", uid=uid)
    assert server.objects == {}


def test_a_run_is_made_of_these() -> None:
    assert {name.split()[0] for name in THINGS} >= {"Namespace", "NetworkPolicy", "ResourceQuota", "LimitRange", "Pod"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("thing", THINGS)
def test_each_thing_of_a_run_is_there_once_and_goes_whatever_happens_to_the_answers(
    server: Server, cluster: Cluster, thing: str, fault: str
) -> None:
    """As the driver makes it: what only one attempt may have is created, its walls are applied."""
    manifest = deepcopy(THINGS[thing])
    kind, name, namespace = manifest["kind"], manifest["metadata"]["name"], manifest["metadata"].get("namespace")
    server.faults += [("POST", FAULTS[fault]), ("PATCH", FAULTS[fault]), ("DELETE", FAULTS[fault])]
    if kind in ("Namespace", "Pod"):
        made = create(cluster, manifest)
        assert server.asked.count("POST") == 2
        assert made["metadata"]["uid"] in {one["metadata"].get("uid") for one in server.objects.values()}
    else:
        cluster.apply(manifest)
        assert server.asked.count("PATCH") == 2
    assert [(one["kind"], one["metadata"]["name"]) for one in server.objects.values()] == [(kind, name)]

    if kind in ("Namespace", "Pod"):
        cluster.delete(kind, name, namespace, uid=made["metadata"]["uid"])
        assert server.objects == {}, "and with a namespace all that is in it"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_read_is_read_whatever_happens_to_the_answer(server: Server, cluster: Cluster, fault: str) -> None:
    cluster.create(POD)
    server.faults.append(("GET", FAULTS[fault]))
    assert (cluster.get("Pod", "run", "bd") or {})["metadata"]["name"] == "run"


@pytest.mark.parametrize(("status", "kind"), [(401, Denied), (403, Denied), (409, Taken), (422, ClusterError)])
def test_a_refusal_is_final(server: Server, cluster: Cluster, status: int, kind: type[ClusterError]) -> None:
    server.faults.append(("PATCH", refuses(status)))
    with pytest.raises(kind, match="not now") as refused:
        cluster.apply(POD)
    assert (refused.value.status, refused.value.reason) == (status, "Broken")
    assert server.asked == ["PATCH"]


def test_patience_has_an_end(server: Server) -> None:
    server.faults += [("GET", refuses(503))] * 50
    with pytest.raises(Unreachable, match="not now"):
        _cluster(server, patience_s=0.5).get("Pod", "run", "bd")
    assert 1 < server.asked.count("GET") < 50


def test_a_redirect_is_not_followed(server: Server, cluster: Cluster) -> None:
    server.faults.append(("GET", refuses(302, Location=f"http://127.0.0.1:{server.server_address[1]}/elsewhere")))
    with pytest.raises(ClusterError):
        cluster.get("Pod", "run", "bd")
    assert server.asked == ["GET"]
