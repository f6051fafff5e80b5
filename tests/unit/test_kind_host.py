"""What a host lacks to make clusters is said with its remedy, and never raised."""

from pathlib import Path

import pytest

from service.core.placement import version_at_least
from workers.boundaries.cluster.engine import Engine
from workers.boundaries.cluster.kind_host import (
    INOTIFY_INSTANCES,
    INOTIFY_WATCHES,
    Needs,
    inotify_lacks,
    lacks,
    memory_lacks,
    versions,
)
from workers.boundaries.cluster.kind_render import Node

INFO = '{"ServerVersion": "28.5.2", "CgroupVersion": "2", "MemTotal": 25769803776}'
IMAGE = '[{"Id": "sha256:0123", "Config": {"Labels": {"dev.blastdoor.node-image": "1"}}}]'


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def needs(folder: Path, *, kind: str = "echo kind v0.33.0 go1.26.5 linux/amd64", info: str = f"echo '{INFO}'",
          image: str = f"echo '{IMAGE}'", host: str = "unix:///run/docker.sock", node_image: str = "blastdoor-node:1",
          node: Node | None = None, instances: int = 8192, watches: int = 10**6) -> Needs:  # fmt: skip
    (folder / "max_user_instances").write_text(str(instances))
    (folder / "max_user_watches").write_text(str(watches))
    docker = script(folder / "docker", f'case "$1" in info) {info};; image) {image};; esac')
    return Needs(
        engine=Engine(docker=docker, host=host, home=folder), kind=script(folder / "kind", kind), node_image=node_image,
        node=node or Node(), max_clusters=2, inotify=folder,
    )  # fmt: skip


def test_a_host_that_has_all_lacks_nothing_and_says_of_what_it_builds(tmp_path: Path) -> None:
    found = needs(tmp_path)
    assert lacks(found) == ()
    assert versions(found) == {"kind": "0.33.0", "engine": "28.5.2", "node_image": "sha256:0123"}


def test_the_release_of_gvisor_is_what_the_node_image_says_so_that_a_policy_can_ask_for_a_later_one(
    tmp_path: Path,
) -> None:
    image = IMAGE.replace('"1"', '"1", "dev.blastdoor.runsc": "20260905"')
    found = versions(needs(tmp_path, image=f"echo '{image}'"))
    assert version_at_least(found["runsc"], "20260901")
    assert not version_at_least(found["runsc"], "20260906")
    assert "runsc" not in versions(needs(tmp_path)), "of an image that does not say it nothing is known"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": "exit 127"}, "install 0.33 or later"),
        ({"kind": "echo kind v0.32.1 go1.25 linux/amd64"}, "is 0.32.1"),
        ({"instances": 95}, "sysctl -w fs.inotify.max_user_instances=512"),
        ({"watches": 8192 * 2 - 1}, "sysctl -w fs.inotify.max_user_watches=524288"),
        ({"host": "tcp://10.0.0.1:2375"}, "an engine on this host"),
        ({"info": "echo 'cannot connect to the docker API: no such file or directory' >&2; exit 1"}, "start it"),
        ({"info": "echo surprise"}, "did not say what it is"),
        ({"image": "echo 'Error response from daemon: No such image: x' >&2; exit 1"}, "build or load it there first"),
        ({"image": """echo '[{"Id": "sha256:0", "Config": {"Labels": null}}]'"""}, "it has no label"),
        ({"node_image": ""}, "BLASTDOOR_KIND_NODE_IMAGE"),
        ({"node": Node(memory_bytes=13 * 2**30)}, "memory for 2 clusters of 13312 MiB"),
    ],
)
def test_each_thing_that_is_missing_is_named_with_its_remedy(
    tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    missing = lacks(needs(tmp_path, **changed))  # type: ignore[arg-type]
    assert len(missing) == 1, missing
    assert said in missing[0]


def test_programs_that_are_not_there_are_missing_and_no_error(tmp_path: Path) -> None:
    nowhere = Engine(docker=Path("/nonexistent/docker"), host="unix:///x", home=tmp_path)
    absent = Needs(engine=nowhere, kind=Path("/nonexistent/kind"), node_image="x", node=Node(), max_clusters=1,
                   inotify=tmp_path)  # fmt: skip
    missing = lacks(absent)
    assert [said.split(" at ")[0].split(",")[0] for said in missing] == ["kind", "inotify", "docker's command"]
    assert versions(absent) == {}


def test_inotify_has_to_be_enough_for_all_clusters_at_once() -> None:
    assert not inotify_lacks(instances=INOTIFY_INSTANCES * 3, watches=INOTIFY_WATCHES * 3, clusters=3)
    assert len(inotify_lacks(instances=INOTIFY_INSTANCES * 3 - 1, watches=INOTIFY_WATCHES * 3 - 1, clusters=3)) == 2
    (said,) = inotify_lacks(instances=INOTIFY_INSTANCES * 20 - 1, watches=10**9, clusters=20)
    assert f"max_user_instances={INOTIFY_INSTANCES * 20}`" in said, (
        "more than the usual remedy, when that is not enough"
    )


def test_a_cluster_is_not_begun_in_memory_that_is_not_there(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24576000 kB\nMemAvailable:     999999 kB\n")
    assert "976 MiB are left" in memory_lacks(meminfo)[0]
    meminfo.write_text("MemTotal:       24576000 kB\nMemAvailable:    9999999 kB\n")
    assert memory_lacks(meminfo) == ()


def test_an_operator_is_told_of_inotify_what_is_looked_for() -> None:
    told = (Path(__file__).parents[2] / "docs/operations.md").read_text("utf-8")
    assert f"{INOTIFY_INSTANCES} instances and {INOTIFY_WATCHES:,} watches for each cluster" in told
