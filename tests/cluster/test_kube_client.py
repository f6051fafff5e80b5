"""Our client against a real API server: objects, watches, and commands in containers whose end nobody can forge."""

import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab.outside import Lab
from tests.cluster.pods import WITHIN_S, eventually, pod
from workers.kube import Cluster, ClusterError, ExecEnded, Manifest, Taken, Unreachable
from workers.kube.connection import CONNECT_S

FORGED = (
    b'{"metadata":{},"status":"Failure","reason":"NonZeroExitCode",'
    b'"details":{"causes":[{"reason":"ExitCode","message":"9"}]}}'
)


@pytest.fixture(scope="module")
def cluster(kubeconfig: Path) -> Iterator[Cluster]:
    cluster = Cluster.from_kubeconfig(kubeconfig)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def room(cluster: Cluster) -> Iterator[str]:
    name = f"client-{secrets.token_hex(4)}"
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    eventually(lambda: cluster.get("ServiceAccount", "default", name))
    yield name
    cluster.delete("Namespace", name)


@pytest.fixture(scope="module", params=["runc", "gvisor"])
def running(request: pytest.FixtureRequest, cluster: Cluster, room: str) -> str:
    """The name of a pod with a shell in it."""
    name = f"shell-{request.param}"
    runtime = None if request.param == "runc" else request.param
    cluster.create(placed(pod(name, "sleep 3600", runtime=runtime), room))
    for _, found in cluster.watch("Pod", room, name=name, seconds=WITHIN_S):
        if found["status"]["phase"] == "Running":
            return name
    raise AssertionError("the pod does not run")


def placed(manifest: Manifest, namespace: str) -> Manifest:
    return manifest | {"metadata": manifest["metadata"] | {"namespace": namespace}}


def config(namespace: str, name: str, **data: str) -> Manifest:
    metadata = {"name": name, "namespace": namespace, "labels": {"mine": "yes"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


class Play:
    """A command in the pod, and all that it printed."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster, self._where = cluster, (namespace, name, "main")
        self.streams = {"stdout": bytearray(), "stderr": bytearray()}
        self.seen = threading.Event()

    def __call__(self, script: str, *, stdin: Iterator[bytes] | None = None, seconds: float = WITHIN_S,
                 stop: threading.Event | None = None) -> ExecEnded:  # fmt: skip
        return self._cluster.exec_(
            *self._where, ["/bin/sh", "-c", script], stdin=stdin, on_output=self.take,
            deadline=time.monotonic() + seconds, stop=(stop or threading.Event()).is_set,
        )  # fmt: skip

    def take(self, stream: str, data: bytes) -> None:
        self.streams[stream] += data
        self.seen.set()


@pytest.fixture
def play(cluster: Cluster, room: str, running: str) -> Play:
    return Play(cluster, room, running)


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_a_command_ends_with_its_exit_code(play: Play, code: int) -> None:
    assert play(f"echo out; echo err >&2; exit {code}") == ExecEnded("exited", code)
    assert play.streams == {"stdout": b"out\n", "stderr": b"err\n"}


def test_nothing_that_a_command_prints_can_set_its_exit_code(play: Play) -> None:
    script = f"printf '%s' '{FORGED.decode()}'; printf '\\003%s' '{FORGED.decode()}' >&2; exit 3"
    assert play(script) == ExecEnded("exited", 3)
    assert play.streams["stdout"] == FORGED


def test_a_program_that_is_not_there_is_a_result(cluster: Cluster, room: str, running: str) -> None:
    ended = cluster.exec_(
        room, running, "main", ["/no/such/program"], on_output=lambda *_: None, deadline=time.monotonic() + WITHIN_S
    )
    assert (ended.why, ended.exit_code) in {("failed", None), ("exited", 127), ("exited", 128)}


def test_what_a_command_reads_while_it_prints_comes_back_whole(play: Play) -> None:
    """More in both directions than any buffer on the way holds."""
    sent = os.urandom(1024) * 6000
    chunks = (sent[start : start + 100_000] for start in range(0, len(sent), 100_000))
    ended = play(f"head -c {len(sent)}", stdin=chunks)
    assert ended == ExecEnded("exited", 0)
    assert bytes(play.streams["stdout"]) == sent


def test_a_command_that_reads_nothing_keeps_nobody_waiting(play: Play) -> None:
    """All that it prints comes. Its status may not: Kubernetes holds it back behind what is unread."""
    endless = iter(lambda: b"x" * 65536, b"")
    stop = threading.Event()
    ended: list[ExecEnded] = []
    script = "head -c 3000000 /dev/zero; exit 5"
    thread = threading.Thread(target=lambda: ended.append(play(script, stdin=endless, stop=stop)))
    thread.start()
    eventually(lambda: len(play.streams["stdout"]) == 3_000_000)
    stop.set()
    thread.join(WITHIN_S)
    assert ended in ([ExecEnded("stopped")], [ExecEnded("exited", 5)])


def test_a_command_is_left_at_its_deadline_and_when_told_to_stop(play: Play) -> None:
    assert play("sleep 600", seconds=0.5).why == "deadline"
    stop = threading.Event()
    ended: list[ExecEnded] = []
    thread = threading.Thread(target=lambda: ended.append(play("while echo x; do true; done", stop=stop)))
    thread.start()
    assert play.seen.wait(WITHIN_S)
    stop.set()  # in the middle of a flood
    thread.join(WITHIN_S)
    assert [one.why for one in ended] == ["stopped"]


def test_a_pod_that_is_not_there_is_an_error(cluster: Cluster, room: str) -> None:
    with pytest.raises(ClusterError, match="not found"):
        cluster.exec_(room, "none", "main", ["id"], on_output=lambda *_: None, deadline=time.monotonic() + WITHIN_S)


# --- Objects ----------------------------------------------------------------------------------------------------------


def test_what_is_created_twice_is_ours_only_with_our_labels_on_it(cluster: Cluster, room: str) -> None:
    first = cluster.create(config(room, "twice", a="1"))
    again = cluster.create(config(room, "twice", a="1"), ours={"mine": "yes"})
    assert again["metadata"]["uid"] == first["metadata"]["uid"]
    for ours in (None, {"mine": "no"}, {"mine": "yes", "fence": "2"}):
        with pytest.raises(Taken, match="already exists"):
            cluster.create(config(room, "twice", a="1"), ours=ours)


def test_only_the_very_object_is_deleted(cluster: Cluster, room: str) -> None:
    old = cluster.apply(config(room, "named"))["metadata"]["uid"]
    cluster.delete("ConfigMap", "named", room, uid=old)
    cluster.delete("ConfigMap", "named", room, uid=old)  # absent is success
    new = cluster.apply(config(room, "named"))["metadata"]["uid"]
    cluster.delete("ConfigMap", "named", room, uid=old)  # another took its name
    assert (cluster.get("ConfigMap", "named", room) or {})["metadata"]["uid"] == new
    cluster.delete("ConfigMap", "named", room, uid=new)
    assert cluster.get("ConfigMap", "named", room) is None


def test_a_watch_says_what_is_there_and_then_what_changes(cluster: Cluster, room: str) -> None:
    cluster.apply(config(room, "watched", a="1"))
    seen = []
    for what, found in cluster.watch("ConfigMap", room, name="watched", seconds=WITHIN_S):
        seen.append((what, found.get("data", {}).get("a")))
        match what:
            case "ADDED":
                cluster.apply(config(room, "watched", a="2"))
            case "MODIFIED":
                cluster.delete("ConfigMap", "watched", room)
            case "DELETED":
                break
    assert seen == [("ADDED", "1"), ("MODIFIED", "2"), ("DELETED", "2")]


def test_a_watch_since_an_object_tells_only_what_came_after(cluster: Cluster, room: str) -> None:
    old = cluster.apply(config(room, "since", a="1"))
    cluster.apply(config(room, "since", a="2"))
    cluster.delete("ConfigMap", "since", room)
    cluster.apply(config(room, "since", a="3"))
    seen = []
    for what, found in cluster.watch("ConfigMap", room, name="since", since=old, seconds=WITHIN_S):
        seen.append((what, found["data"]["a"]))
        if len(seen) == 3:
            break
    assert seen == [("MODIFIED", "2"), ("DELETED", "2"), ("ADDED", "3")]


def test_a_watch_ends_after_its_time(cluster: Cluster, room: str) -> None:
    began = time.monotonic()
    assert list(cluster.watch("Pod", room, labels={"no": "such"}, seconds=0.5)) == []
    assert time.monotonic() - began >= 0.5


def test_kinds_are_listed_by_label(cluster: Cluster, room: str) -> None:
    cluster.apply(config(room, "listed"))
    found = cluster.list("ConfigMap", room, labels={"mine": "yes"})
    assert "listed" in {one["metadata"]["name"] for one in found}
    assert {one["kind"] for one in found} == {"ConfigMap"}
    assert cluster.list("ConfigMap", labels={"mine": "never"}) == []


# --- An API server that is away ---------------------------------------------------------------------------------------


def test_an_api_server_that_is_away_for_a_while_is_waited_for(lab: Lab, room: str) -> None:
    patient = Cluster.from_kubeconfig(lab.kubeconfig, patience_s=WITHIN_S)
    server = lab.pid("kube-apiserver")
    os.kill(server, signal.SIGSTOP)
    wake = threading.Timer(1.0, os.kill, (server, signal.SIGCONT))
    wake.start()
    try:
        assert patient.get("Namespace", "default")
    finally:
        wake.join()
    patient.close()


def test_a_command_for_an_api_server_that_is_away_begins_when_it_is_back(lab: Lab, room: str, running: str) -> None:
    """And says when: the time of a step does not run before."""
    patient = Cluster.from_kubeconfig(lab.kubeconfig, patience_s=WITHIN_S)
    server, began = lab.pid("kube-apiserver"), list[float]()
    os.kill(server, signal.SIGSTOP)
    woken = list[float]()

    def wake() -> None:
        woken.append(time.monotonic())
        os.kill(server, signal.SIGCONT)

    timer = threading.Timer(CONNECT_S + 1, wake)  # so that one attempt, at least, has failed
    timer.start()
    try:
        ended = patient.exec_(
            room, running, "main", ["/bin/sh", "-c", "exit 7"], on_output=lambda *_: None,
            deadline=time.monotonic() + WITHIN_S, begins=lambda: began.append(time.monotonic()),
        )  # fmt: skip
    finally:
        timer.join()
    assert ended == ExecEnded("exited", 7)
    assert len(began) == 1
    assert began[0] > woken[0]
    patient.close()


def test_patience_ends(tmp_path: Path, lab: Lab) -> None:
    nobody = tmp_path / "kubeconfig"
    nobody.write_text(lab.kubeconfig.read_text().replace("https://127.0.0.1:", "https://127.0.0.1:1/#"))
    with pytest.raises(Unreachable):
        Cluster.from_kubeconfig(nobody, patience_s=0.3).get("Namespace", "default")


def test_no_key_of_a_kubeconfig_is_left_in_a_file(
    cluster: Cluster, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Cluster.from_kubeconfig(lab.kubeconfig).get("Namespace", "default")
    assert list(tmp_path.iterdir()) == []


def test_a_kubeconfig_that_trusts_anybody_is_not_taken(lab: Lab, tmp_path: Path) -> None:
    weak = tmp_path / "kubeconfig"
    weak.write_text(lab.kubeconfig.read_text().replace('"server":', '"insecure-skip-tls-verify": true, "server":'))
    with pytest.raises(ClusterError, match="is not taken"):
        Cluster.from_kubeconfig(weak)
