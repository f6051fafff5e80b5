"""What lasts longer than one request to an API server: watches, credentials, connections, commands that are not begun.

A stand-in again, since a real one does none of this on demand: each test says what it answers, one request after
another."""

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from kubernetes import client

from workers.kube import Cluster, ClusterError, Denied, Manifest, NotBegun, Unreachable, together

Answer = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = []
        self.otherwise: Answer = says(404, {"message": "nothing was arranged"})
        self.asked: list[dict[str, str]] = []
        """Of each request: its path, its query, and who asked."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        where = urlsplit(self.path)
        asked = dict(parse_qsl(where.query)) | {"path": where.path, "user": self.headers.get("Authorization", "")}
        self.server.asked.append(asked)
        (self.server.answers.pop(0) if self.server.answers else self.server.otherwise)(self)


def says(status: int, body: Manifest, *, and_hangs_up: bool = False) -> Answer:
    def answer(handler: Handler) -> None:
        data = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
        if and_hangs_up:  # without a word of warning, as one does that was restarted
            handler.close_connection = True

    return answer


def tells(*events: tuple[str, Manifest]) -> Answer:
    """A watch's connection, which ends after these."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for what, found in events:
            handler.wfile.write(json.dumps({"type": what, "object": found}).encode() + b"\n")
        handler.close_connection = True

    return answer


def lists(version: str, *objects: Manifest) -> Answer:
    return says(200, {"metadata": {"resourceVersion": version}, "items": list(objects)})


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True


def pod(name: str, version: str = "1") -> Manifest:
    return {"metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": version}}


GONE = ("ERROR", {"code": 410, "reason": "Expired"})


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
    cluster = Cluster(client.Configuration(host=server.url), patience_s=20)
    yield cluster
    cluster.close()


# --- Watches ----------------------------------------------------------------------------------------------------------


def told(cluster: Cluster, *, until: str, since: Manifest | None = None) -> list[tuple[str, str]]:
    """What a watch of pods says, up to the end of one of them."""
    said = []
    for what, found in cluster.watch("Pod", "bd", since=since, seconds=20):
        said.append((what, found["metadata"]["name"]))
        if said[-1] == ("DELETED", until):
            return said
    raise AssertionError(said)


@pytest.mark.parametrize(
    "end",
    [[], [GONE], [("BOOKMARK-OF-SOME-OTHER-DAY", pod("a"))]],
    ids=["the connection ends", "too old to go on from", "an event of no known kind"],
)
def test_no_end_is_missed_between_two_connections_of_a_watch(
    server: Server, cluster: Cluster, end: list[tuple[str, Manifest]]
) -> None:
    server.answers = [
        tells(("ADDED", pod("a")), ("ADDED", pod("b")), *end),
        lists("10", pod("b", "7")),
        tells(("DELETED", pod("b", "11"))),
    ]
    said = told(cluster, until="b")
    assert [one for one in said if "BOOKMARK" not in one[0]] == [
        ("ADDED", "a"), ("ADDED", "b"), ("DELETED", "a"), ("ADDED", "b"), ("DELETED", "b"),
    ]  # fmt: skip
    assert [one.get("resourceVersion") for one in server.asked] == [None, None, "10"]


def test_a_watch_whose_beginning_is_too_old_lists_and_goes_on(server: Server, cluster: Cluster) -> None:
    server.answers = [says(410, {"reason": "Expired"}), lists("10", pod("a")), tells(("DELETED", pod("a")))]
    assert told(cluster, until="a", since=pod("a", "3")) == [("ADDED", "a"), ("DELETED", "a")]


def test_a_watch_since_an_object_tells_what_came_after(server: Server, cluster: Cluster) -> None:
    server.answers = [tells(("MODIFIED", pod("a", "8")), ("DELETED", pod("a", "9")))]
    assert told(cluster, until="a", since=pod("a", "7")) == [("MODIFIED", "a"), ("DELETED", "a")]
    assert server.asked[0]["resourceVersion"] == "7"


def test_an_object_that_went_while_nobody_could_say_so_is_told_as_gone(server: Server, cluster: Cluster) -> None:
    server.answers = [hangs_up, lists("10")]
    server.answers.insert(1, tells())
    assert told(cluster, until="a", since=pod("a", "7")) == [("DELETED", "a")]


# --- Who we are -------------------------------------------------------------------------------------------------------


def kubeconfig(server: str, **user: str) -> str:
    return json.dumps(
        {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
    )  # fmt: skip


def knows(token: str) -> Answer:
    def answer(handler: Handler) -> None:
        known = handler.headers.get("Authorization") == f"Bearer {token}"
        says(*((200, pod("a")) if known else (401, {"message": "Unauthorized"})))(handler)

    return answer


@pytest.mark.parametrize("kept", ["in the kubeconfig", "in a file that it names"])
def test_a_token_that_was_replaced_is_found_when_the_old_one_is_no_longer_taken(
    server: Server, tmp_path: Path, kept: str
) -> None:
    file, beside = tmp_path / "kubeconfig", tmp_path / "token"

    def put(token: str) -> None:
        beside.write_text(token)
        file.write_text(
            kubeconfig(server.url, **({"token": token} if "in the" in kept else {"tokenFile": str(beside)}))
        )

    put("old")
    server.otherwise = knows("old")
    cluster = Cluster.from_kubeconfig(file)
    assert cluster.get("Pod", "a", "bd")
    put("new")
    assert cluster.get("Pod", "a", "bd")  # it is asked for when it is needed, and not before
    server.otherwise = knows("new")
    assert cluster.get("Pod", "a", "bd")
    server.otherwise = knows("newest")
    put("newest")
    with pytest.raises(ClusterError, match="HTTP 200"):  # a command finds it as well; what answered is no websocket
        command(cluster, [])
    users = [one["user"].removeprefix("Bearer ") for one in server.asked]
    assert users == ["old", "old", "old", "new", "new", "newest"]


def test_a_kubeconfig_that_is_as_it_was_is_refused_once_and_for_all(server: Server, tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text(kubeconfig(server.url, token="old"))
    server.otherwise = knows("another")
    with pytest.raises(Denied, match="Unauthorized"):
        Cluster.from_kubeconfig(tmp_path / "kubeconfig").get("Pod", "a", "bd")
    assert len(server.asked) == 1


def test_a_kubeconfig_that_is_half_written_changes_nothing(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(kubeconfig(server.url, token="old"))
    cluster = Cluster.from_kubeconfig(file)
    file.write_text(file.read_text()[:40])
    server.otherwise = knows("another")
    with pytest.raises(Denied, match="Unauthorized"):
        cluster.get("Pod", "a", "bd")


def test_a_cluster_that_moved_is_found_where_the_kubeconfig_has_it_now(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(kubeconfig("http://127.0.0.1:1", token="mine"))
    cluster = Cluster.from_kubeconfig(file, patience_s=20)
    file.write_text(kubeconfig(server.url, token="mine"))
    server.otherwise = knows("mine")
    assert cluster.get("Pod", "a", "bd")
    assert cluster.server == server.url


# --- Connections ------------------------------------------------------------------------------------------------------


def test_connections_that_the_other_side_ended_while_they_were_idle_are_made_anew(
    server: Server, cluster: Cluster
) -> None:
    server.otherwise = says(200, pod("a"), and_hangs_up=True)
    for _ in range(20):
        assert cluster.get("Pod", "a", "bd")
    assert len(server.asked) == 20


def test_many_threads_ask_at_once_and_each_has_its_own_answer(server: Server, cluster: Cluster) -> None:
    def echoes(handler: Handler) -> None:
        says(200, pod(handler.path.rpartition("/")[2]), and_hangs_up=handler.path.endswith("3"))(handler)

    server.otherwise = echoes

    def ask(number: int) -> None:
        for turn in range(10):
            name = f"{number}-{turn}"
            assert (cluster.get("Pod", name, "bd") or {})["metadata"]["name"] == name

    together([lambda number=number: ask(number) for number in range(24)])  # type: ignore[misc]
    assert max(Counter(one["path"] for one in server.asked).values()) == 1


def test_what_fails_of_several_is_raised_when_all_have_ended() -> None:
    ended = []

    def ends(number: int) -> int:
        ended.append(number)
        if number:
            raise ClusterError(f"number {number}")
        return number

    with pytest.raises(ClusterError, match="number 1"):
        together([lambda: ends(0), lambda: ends(1), lambda: ends(2)])
    assert sorted(ended) == [0, 1, 2]
    assert together([lambda: ends(0)] * 3) == [0, 0, 0]


# --- Commands ---------------------------------------------------------------------------------------------------------


def command(cluster: Cluster, begun: list[bool], **more: Any) -> object:
    return cluster.exec_(
        "bd",
        "a",
        "run",
        ["id"],
        on_output=lambda *_: None,
        deadline=sys.maxsize,
        begins=lambda: begun.append(True),
        **more,
    )


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_command_that_was_not_begun_is_asked_for_again(server: Server, cluster: Cluster, status: int) -> None:
    begun: list[bool] = []
    server.answers = [says(status, {"message": "not now"})] * 2
    with pytest.raises(ClusterError, match="nothing was arranged"):
        command(cluster, begun)
    assert (len(server.asked), begun) == (3, [])


def test_a_command_that_may_have_begun_is_not(server: Server, cluster: Cluster) -> None:
    server.otherwise = hangs_up
    with pytest.raises(Unreachable) as lost:
        command(cluster, [])
    assert not isinstance(lost.value, NotBegun)
    assert len(server.asked) == 1


def test_patience_with_a_command_that_does_not_begin_has_an_end(server: Server) -> None:
    server.otherwise = says(503, {"message": "not now"})
    impatient = Cluster(client.Configuration(host=server.url), patience_s=0.5)
    with pytest.raises(NotBegun, match="not now"):
        command(impatient, [])
    assert 1 < len(server.asked) < 10
