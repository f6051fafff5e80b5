"""D21 to D25 and D29 in pods, the whole way: what a guest may see and touch, as test_whole_way_isolation.py
(tests/escape) has them for the boundary `gvisor`. The programs are the corpus' own, here one after the other in one run
behind each wall, with another tenant's run beside it. In the control run one thing is opened for each of them.

Where the expectation differs from that of the boundary `gvisor`:

- D21, runc: the list of mounts names paths of the node (the pod's uid, the image's layers). No token is in it.
- D23, runc: it can end the program of ours that plays its own step, never the pod's first process.
- D23, gvisor: it can end the pod's first process, which gVisor does not keep from it, and with it its own sandbox.
  In both cases its run does not pass, and nobody else's is touched.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lab.components import Place
from tests.cluster.whole_way import VARIANTS, Ground, landed, neighbour
from tests.escape import test_whole_way_isolation as corpus
from tests.escape.whole_way import everything_of, fingerprint, new_token, program
from tests.stack import Document, finished, python, submit
from tests.sweep import sweep, swept
from workers.conformance import programs

INPUT = new_token()
MOUNTS = ("/usr", "/etc", "/tmp", "/work")
NODES_OWN = ("/run/containerd.sock", "/var/lib/kubelet/pods", "/etc/kubernetes/admin.conf")
ENVIRONMENT = python("import json,os,sys; print(json.dumps([dict(os.environ), os.getcwd(), sys.argv, os.getuid()]))")
KEEP = corpus.TestD21Proc.KEEP.replace(" > seen", "")
"""Handed over as it stands: the program before it prints only what has a token's form."""
SPOIL = "cat input.txt; echo spoiled > input.txt; cat input.txt"


@dataclass(frozen=True)
class Played:
    """`mark`: in the names that it left, where it could."""

    run: Document
    seen: bytes
    mark: str

    def text(self, step: str) -> str:
        printed: str = next(row["stdout"]["text"] for row in self.run["steps"] if row["name"] == step)
        return printed

    def said(self, step: str, word: str) -> list[str]:
        lines = self.text(step).splitlines()
        return [line.removeprefix(word).strip() for line in lines if line.startswith(f"{word} ")]


@dataclass(frozen=True)
class Held(Played):
    """`foreign`: tokens that must not come out, by where they were. `before` and `after`: of the node."""

    foreign: dict[str, str]
    before: Any
    after: Any


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def host_file() -> Iterator[Path]:
    """A file that anybody on the node may read: only the wall is in the way."""
    directory = Path("/var/tmp") / f"bd-canary-{new_token()}"
    directory.mkdir(mode=0o755)
    path = directory / "canary"
    path.write_text(new_token())
    path.chmod(0o644)
    yield path
    path.unlink()
    directory.rmdir()


def play(ground: Ground, variant: str, *files: Path, token: str | None = None) -> Played:
    """All of them. `token`: in the environment of each step, which only a control has."""
    mark, opened = new_token(), token is not None
    places = [*corpus.TestD22Writing.NEW, *(["/work"] if opened else [])]
    mounting = {"mark": mark, "places": MOUNTS}
    state = Place(ground.lab.state)
    steps: dict[str, Any] = {
        "proc": program(programs.SEARCH_PROC),
        "keep": KEEP,
        "write": program(
            programs.WRITE_PLACES,
            new=[f"{place.rstrip('/')}/{mark}-new" for place in places], settings=corpus.TestD22Writing.SETTINGS,
        ),
        "spoil": SPOIL,
        "mount": program(programs.MOUNT_OVER, **mounting, private=not opened),
        "marks": program(programs.LOOK_FOR_MARK, **mounting | {"places": (*MOUNTS, "/usr/bin")}),
        "files": program(
            programs.SEARCH_FILES, sockets=[*corpus.TestD25Files.SOCKETS, str(state.containerd)],
            devices=corpus.TestD25Files.DEVICES, nodes=((1, 1), (8, 0), (10, 232)),
            files=[*map(str, files), *NODES_OWN], trees=corpus.TestD25Files.TREES,
        ),
        "environment": ENVIRONMENT,
        "processes": program(programs.REACH_PROCESSES),
        "after": program(programs.LOOK_FOR_MARK, mark="none", places=[]),
    }  # fmt: skip
    client, rows = ground.tenant(variant), [{"name": name, "run": run, "always": True} for name, run in steps.items()]
    env = {"env": {"TOKEN": token}} if token else {}
    run_id = submit(client, *rows, bundle=bundle(), limits={"wall": "240s"}, **env)
    run = landed(finished(client, run_id, within_s=300), variant)
    played = Played(run, everything_of(client, run), mark)
    for name in ("proc", "write", "mount", "marks", "files"):
        assert programs.ENDED in played.text(name), run
    assert programs.BEGUN in played.text("processes"), run
    return played


def bundle() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("input.txt")
        info.size = len(INPUT)
        archive.addfile(info, io.BytesIO(INPUT.encode()))
    return buffer.getvalue()


def node_as_it_is(ground: Ground) -> tuple[str, list[str]]:
    """A digest of the node's files and of the image's one layer, as it lies there; and the kernel's settings."""
    layers = Place(ground.lab.state).disk.glob("containerd/*snapshotter*/snapshots/*/fs/usr/bin/python3")
    images = [path.parents[2] for path in layers]
    assert len(images) == 1, images
    return fingerprint(*corpus.HOST, images[0]), corpus.settings()


@pytest.fixture(scope="module")
def held(ground: Ground, variant: str, host_file: Path) -> Held:
    """The wall as it is."""
    before = node_as_it_is(ground)
    with ground.same_worker(), neighbour(ground, variant) as beside:
        secret = beside.scratch / "work/secret"
        assert beside.token.encode() in ground.inside(beside.run_id, "cat secret"), "control: it is there to be found"
        with open(f"/proc/{ground.stack.children['worker']}/environ") as environ:
            assert ground.stack.token in environ.read(), "control: and so is the worker's"
        played = play(ground, variant, host_file, secret, ground.site.ready.engine_kubeconfig)
    foreign = {
        "the worker's environment": ground.stack.token,
        "the installation": ground.stack.installation,
        "another run": beside.token,
        "another run's id": beside.run_id,
        "a file of the node": host_file.read_text(),
        "the tenant's key": ground.stack.ready["tenant_key"],
    }
    return Held(**vars(played), foreign=foreign, before=before, after=node_as_it_is(ground))


@pytest.fixture(scope="module")
def opened(ground: Ground, variant: str) -> Played:
    """The control: a token in its own environment, /work among the places, its marks left in the open."""
    return play(ground, variant, token=new_token())


def own_token(played: Played) -> str:
    environment = json.loads(played.text("environment"))[0]
    return str(environment["TOKEN"])


def test_no_token_of_ours_of_the_node_or_of_another_run_comes_out(held: Held, opened: Played) -> None:
    assert [where for where, token in held.foreign.items() if token.encode() in held.seen] == []
    assert own_token(opened).encode() in opened.seen, "control"


def test_d21_nothing_is_found_in_proc(held: Held, opened: Played, variant: str) -> None:
    assert held.said("proc", "FOUND") == []
    assert b"HOME=/work" in held.seen, "it did read what it may read"
    assert own_token(opened) in " ".join(opened.said("proc", "FOUND")), "control"
    assert (b"kubelet/pods/" in held.seen) is (variant == "runc"), "the difference that is written down"


def test_d22_nothing_can_be_written_and_node_image_and_kernel_are_as_they_were(held: Held, opened: Played) -> None:
    assert held.said("write", "WROTE") == []
    assert held.after == held.before
    assert [place for place in corpus.TestD22Writing.NEW if Path(place, f"{held.mark}-new").exists()] == []
    assert opened.said("write", "WROTE") == [f"/work/{opened.mark}-new"], "control"


def test_d22_what_was_uploaded_can_be_overwritten_inside_and_comes_anew_to_the_next_run(
    held: Held, opened: Played
) -> None:
    assert [played.text("spoil") for played in (held, opened)] == [f"{INPUT}spoiled\n"] * 2


def test_d23_no_other_process_can_be_traced_read_or_killed(held: Held, opened: Played, variant: str) -> None:
    """The neighbour has passed, or there would be no `held`; and the worker is the same."""
    assert held.said("processes", "ATTACHED") == []
    assert held.said("processes", "FOUND") == []
    assert held.run["outcome"] != "passed", "it has ended its own step, and gains nothing by it"
    first_process_lives = programs.ENDED in held.text("after")
    assert first_process_lives is (variant == "runc"), "the difference that is written down"
    assert own_token(opened) in " ".join(opened.said("processes", "FOUND")), "control"


def test_d24_namespaces_and_mounts_of_its_own_reach_neither_the_next_step_nor_the_node(
    held: Held, opened: Played
) -> None:
    assert held.said("marks", "STANDS") == []
    assert sweep(held.mark) == []
    uids = [played.run["evidence"]["pod_spec"]["uid"] for played in (held, opened)]
    assert [str(found) for found in swept(*uids, within_s=30)] == []
    assert "/work" in opened.said("marks", "STANDS"), "control"


def test_d25_no_socket_device_file_of_the_node_or_work_of_another_run_is_there(held: Held, opened: Played) -> None:
    assert held.said("files", "REACHED") + held.said("files", "OPENED") + held.said("files", "FOUND") == []
    assert own_token(opened) in " ".join(opened.said("files", "FOUND")), "control"


def test_d29_a_step_sees_exactly_the_documented_names_as_a_user_of_its_own(held: Held, opened: Played) -> None:
    environment, cwd, argv, uid = json.loads(held.text("environment"))
    assert set(environment) == {"PATH", "HOME", "LANG", "TMPDIR"}, "neither HOSTNAME nor KUBERNETES_*, which a pod has"
    assert set(json.loads(opened.text("environment"))[0]) == {*environment, "TOKEN"}, "control: a name more is seen"
    assert (environment["HOME"], environment["TMPDIR"], cwd, argv) == ("/work", "/tmp", "/work", ["-c"])
    assert uid == held.run["evidence"]["uid"] >= 100_000
    assert uid != opened.run["evidence"]["uid"], "RLIMIT_NPROC counts by user"


def test_the_image_is_the_one_that_was_configured_by_its_digest(ground: Ground, held: Held) -> None:
    assert held.run["evidence"]["image"].rpartition("@")[2] == ground.image.rpartition("@")[2]
