"""D26, D27, D28 and D30 in pods, the whole way: whom a guest may reach.

On the lab's node listen the addresses that a guest would look for (ears.py); the API server, the kubelet and etcd are
the real ones. The control of each is the very same attack in the very same kind of pod, while the network policy
controller is installed and inert: there it all is reached. What the lab cannot show: its pods have no IPv6.

Where the expectation differs from that of the boundary `gvisor`: there a sandbox has no interface at all, so nothing
leaves it. A pod has one, and it is the node that drops what leaves it: nothing arrives anywhere, but a packet is made.
That a policy holds for a pod's own node too is this lab's controller's doing; Kubernetes does not promise it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.cluster.ears import METADATA, NAME_SERVERS, NEIGHBOUR, TARGETS, Ears, listening
from tests.cluster.lab.components import ADDRESS, API_PORT, SERVICE_OF_API
from tests.cluster.whole_way import VARIANTS, WAIT, Ground, landed
from tests.escape.whole_way import everything_of, new_token, program
from tests.stack import Document, eventually, finished, python, submit
from workers.conformance import programs

KUBELET_PORT, ETCD_PORT = 10250, 2379
CLUSTER = ((ADDRESS, API_PORT), (ADDRESS, KUBELET_PORT))
"""What answers on the node to whoever gets through."""
UNREACHABLE_ANYHOW = ((SERVICE_OF_API, 443), (ADDRESS, ETCD_PORT), ("127.0.0.1", ETCD_PORT), ("fd00:ec2::254", 80))
"""Tried too: on another cluster they might answer."""


def ask(*targets: tuple[str, int]) -> str:
    """A program that looks for a token and asks these API servers, also by name. It says in the request who it is."""
    return f"""
import json, os, socket, ssl
print({programs.BEGUN!r}, flush=True)
for top in ("/var/run/secrets", "/run/secrets"):
    for directory, _, files in os.walk(top):
        for name in files:
            print("TOKEN", directory + "/" + name, flush=True)
print("NAMES", json.dumps([name for name in os.environ if "KUBERNETES" in name]), flush=True)
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
for host, port in (("kubernetes.default.svc", 443), *{targets!r}):
    try:
        with socket.create_connection((host, port), 2) as plain, context.wrap_socket(plain) as line:
            line.sendall(b"GET /api/v1/namespaces?from=guest HTTP/1.0\\r\\nAuthorization: Bearer x\\r\\n\\r\\n")
            print("SERVED", host, line.recv(100).split(b" ")[1].decode(), flush=True)
    except OSError:
        pass
print({programs.ENDED!r}, flush=True)
"""


@dataclass(frozen=True)
class Played:
    """One pod that tried it all. `mark`: the name that it wanted to be resolved; `address`: the pod's own; `audited`:
    how many requests the API server noted meanwhile that say they are a guest's."""

    run: Document
    seen: bytes
    mark: str
    address: str
    audited: int

    def said(self, word: str) -> list[str]:
        lines = [line for step in self.run["steps"] for line in step["stdout"]["text"].splitlines()]
        return [line.removeprefix(word).strip() for line in lines if line.startswith(f"{word} ")]


@pytest.fixture(scope="module")
def token() -> str:
    """What the listeners answer with, so what a guest would come away with."""
    return new_token()


@pytest.fixture(scope="module")
def ears(ground: Ground, token: str) -> Iterator[Ears]:
    with listening(ground.lab, token) as ears:
        yield ears


def play(ground: Ground, variant: str, *, inert: bool) -> Played:
    """With `inert`, network policy stops being enforced once the pod stands: the only thing that a control opens."""
    client, mark, before = ground.tenant(variant), new_token(), len(ground.audited("from=guest"))
    attacks = (
        program(programs.CONNECT, targets=[*TARGETS, *CLUSTER, *(() if inert else UNREACHABLE_ANYHOW)]),
        program(programs.RESOLVE, name=f"{mark}.canary.test", targets=[*NAME_SERVERS * 3, ("127.0.0.1", 53)]),
        python(ask((SERVICE_OF_API, 443), (ADDRESS, API_PORT))),
        program(programs.RESOLVE, name="localhost", targets=[]),
    )
    run_id = submit(client, WAIT, *attacks, limits={"wall": "180s"})
    ground.wait_for_file(run_id, "plays")
    address = ground.pod(run_id)["status"]["podIP"]
    with ground.policy_inert() if inert else ground.as_it_is():
        ground.let_go(run_id)
        run = landed(finished(client, run_id, within_s=240), variant)
    for step in run["steps"][1:]:
        assert programs.ENDED in step["stdout"]["text"], run
    audited = len(ground.audited("from=guest")) - before
    return Played(run, everything_of(client, run), mark, address, audited)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def held(ground: Ground, variant: str, ears: Ears) -> Played:
    """The wall as it is."""
    return play(ground, variant, inert=False)


@pytest.fixture(scope="module")
def opened(ground: Ground, variant: str, ears: Ears) -> Played:
    return play(ground, variant, inert=True)


def test_d26_d27_neither_metadata_nor_node_api_server_or_kubelet_is_reached(
    held: Played, opened: Played, ears: Ears, token: str
) -> None:
    assert held.said("REACHED") == []
    assert ears.heard(f"from {held.address}") == []
    assert token.encode() not in held.seen
    assert set(opened.said("REACHED")) == {f"{host} {port}" for host, port in (*TARGETS, *CLUSTER)}, "control"
    heard = {line.split()[1] for line in ears.heard("tcp", f"from {opened.address}")}
    assert heard == {*METADATA, NEIGHBOUR, ADDRESS}, "control"
    assert token.encode() in opened.seen, "control: the token is what a guest would have come away with"


def test_d28_no_name_is_resolved_no_raw_socket_opens_and_no_query_arrives(
    held: Played, opened: Played, ears: Ears
) -> None:
    names = [said.partition(",")[0] for said in held.said("RESOLVED")]
    assert len(names) == 1, "control: `localhost`, which the pod's own hosts file has, and nothing else"
    assert held.said("OPENED") == []
    assert ears.heard("udp", held.mark) == []
    assert eventually(lambda: {line.split()[1] for line in ears.heard("udp", opened.mark)} >= {NEIGHBOUR, ADDRESS})


def test_d30_there_is_no_token_and_the_api_server_is_asked_nothing(
    ground: Ground, held: Played, opened: Played
) -> None:
    assert (held.said("TOKEN"), held.said("SERVED")) == ([], [])
    assert held.audited == 0
    assert ground.audited(f'"{held.address}"', "from=guest") == []
    assert opened.said("SERVED") == [f"{ADDRESS} 401"], "control: and without a token it is nobody"
    assert eventually(lambda: ground.audited(f'"{opened.address}"', "from=guest")), "control"
    for played in (held, opened):
        assert [json.loads(names) for names in played.said("NAMES")] == [[]]
