"""Cluster API's way to a cluster, against a real API server with its own resource definitions. Who makes machines is
played (`capi_provider.py`); what the engine asks, may, sees and leaves is real."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from service.core.errors import NotYetDestroyed, ProvisionFailed
from tests.cluster.capi_sites import Flag, Site, arguments, away, management, own, site
from tests.cluster.lab.outside import Lab
from tests.cluster.pods import eventually
from tests.sandboxes import Never
from workers.kube import Cluster, ClusterError

__all__ = ["management", "own", "site"]
GARBAGE = b"this: is\nno: kubeconfig\n"


# --- A provider that does well ----------------------------------------------------------------------------------------


def test_a_cluster_is_made_its_kubeconfig_works_and_nothing_is_left_of_it(site: Site) -> None:
    """The kubeconfig that the provider gives away is the lab's own, so it leads to a real API server."""
    assert list(site.provisioner.lacks()) == []
    ref = site.ref()
    path = site.create(ref)
    assert path == site.folder(ref) / "kubeconfig"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    made = Cluster.from_kubeconfig(path)
    assert made.get("Namespace", "kube-system") is not None
    made.close()
    (cluster,) = site.provider.list("Cluster")
    assert cluster["metadata"]["name"] == ref.name
    assert site.told == [
        "the management cluster was asked for a cluster",
        "its infrastructure is there",
        "its control plane has begun",
        "its control plane is there",
        "its nodes are there",
        "waiting for its API server to answer this host",
    ]
    assert len(site.provider.left()) == 5  # the control: Cluster, Machine, infrastructure, secret and place are there
    site.gone(ref)


def test_another_process_finds_it_by_its_labels_and_takes_it_away(site: Site) -> None:
    ref = site.ref()
    site.create(ref)
    other = site.another()
    (found,) = other.discover()
    assert found.model_copy(update={"tenant": ref.tenant}) == ref
    assert found.is_of("acme")
    other.destroy(found)
    other.destroy(found)  # gone is gone
    assert site.provider.left() == []
    assert not site.folder(ref).exists()
    other.close()


def test_what_is_not_there_is_destroyed(site: Site) -> None:
    site.provisioner.destroy(site.ref())


def test_nothing_of_the_tenant_reaches_the_management_cluster_but_a_hash(site: Site) -> None:
    ref = site.ref().model_copy(update={"tenant": "Müller & Söhne {{name}}"})
    site.create(ref)
    (cluster,) = site.provider.list("Cluster")
    assert "ller" not in json.dumps(cluster, ensure_ascii=False)
    assert ref.run_id in json.dumps(cluster)  # the control: what we do say is found this way
    site.gone(ref)


# --- One that does badly ----------------------------------------------------------------------------------------------


def test_a_cluster_that_comes_late_is_waited_for(site: Site) -> None:
    site.conduct.ready_after_s = 4.0
    began = time.monotonic()
    site.create(site.ref())
    assert time.monotonic() - began >= 4.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": 3}, r"after 4 s the cluster is not ready: WorkersAvailable: Waiting: \* WorkersAvailable: no"),
        ({"stages": 0}, r"after 4 s the cluster is not ready: InfrastructureReady"),
        ({"stale": True}, "after 4 s the cluster is not ready: no condition Available yet"),
        ({"kubeconfig": None}, "after 4 s the cluster is ready, but there is no secret bd-.*-kubeconfig"),
        ({"kubeconfig": GARBAGE}, "cannot be used: it holds no kubeconfig"),
        ({"failure": "no machines of this size"}, "will not come: CreateError: no machines of this size"),
        ({"vanishes": True}, "deleted while it is being made|was deleted while it was being made"),
    ],
    ids=["never ready", "not begun", "stale", "no kubeconfig", "garbage", "failed", "vanishes"],
)
def test_a_cluster_that_does_not_come_leaves_nothing(site: Site, change: dict[str, object], says: str) -> None:
    good = replace(site.conduct)
    hurried = site.another(ready_s=4.0)
    for key, value in change.items():
        setattr(site.conduct, key, value)
    if "failure" in change:
        site.conduct.stages = 2
    ref = site.ref()
    with pytest.raises(ProvisionFailed, match=says):
        hurried.create(ref, cancelled=Never(), tell=site.told.append)
    site.gone(ref)
    hurried.close()
    site.provider.conduct = good  # the control: the same place, a provider that does well
    site.create(site.ref())


def test_a_kubeconfig_that_names_a_program_is_not_taken(site: Site, tmp_path: Path) -> None:
    """It would run on the worker's host."""
    said = yaml.safe_load(site.conduct.kubeconfig or b"")
    mark = tmp_path / "ran"
    said["users"][0]["user"] = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "/usr/bin/touch",
                                         "args": [str(mark)], "interactiveMode": "Never"}}  # fmt: skip
    (tmp_path / "hostile").write_text(json.dumps(said))
    with suppress(ClusterError):  # the control: whoever takes it as it is runs the program
        Cluster.from_kubeconfig(tmp_path / "hostile").get("Namespace", "default")
    assert mark.exists()
    mark.unlink()
    site.conduct.kubeconfig = json.dumps(said).encode()
    ref = site.ref()
    with pytest.raises(ProvisionFailed, match="its user says exec, which is not taken"):
        site.create(ref)
    assert not mark.exists()
    site.gone(ref)


def test_a_cluster_that_this_host_cannot_reach_is_no_cluster(site: Site) -> None:
    said = yaml.safe_load(site.conduct.kubeconfig or b"")
    said["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    site.conduct.kubeconfig = json.dumps(said).encode()
    ref = site.ref()
    hurried = site.another(ready_s=6.0)
    with pytest.raises(ProvisionFailed, match="its API server does not answer this host"):
        hurried.create(ref, cancelled=Never(), tell=site.told.append)
    hurried.close()
    site.gone(ref)


# --- An end before it is ready ----------------------------------------------------------------------------------------


def test_a_run_that_is_cancelled_has_no_cluster_seconds_later(site: Site) -> None:
    site.conduct.stages = 3
    cancelled, ref = Flag(), site.ref()
    with ThreadPoolExecutor(1) as threads:
        making = threads.submit(site.provisioner.create, ref, cancelled=cancelled, tell=site.told.append)
        eventually(lambda: "its control plane is there" in site.told)
        assert not making.done()
        cancelled.event.set()
        with pytest.raises(ProvisionFailed, match="not wanted any more"):
            making.result(timeout=60)
    site.gone(ref)


def test_what_is_not_wanted_any_more_is_not_begun(site: Site) -> None:
    cancelled = Flag()
    cancelled.event.set()
    with pytest.raises(ProvisionFailed, match="not wanted any more"):
        site.provisioner.create(site.ref(), cancelled=cancelled, tell=site.told.append)
    assert site.told == []
    assert site.provider.left() == []


@pytest.mark.parametrize("stages", [0, 3, 5], ids=["just asked", "half made", "ready"])
def test_what_a_killed_worker_left_is_found_and_taken_away(site: Site, stages: int) -> None:
    """A real process, killed as kill -9 does, at whatever it does then."""
    site.conduct.stages, ref = stages, site.ref()
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.capi_sites", ref.model_dump_json(), *arguments(site)],
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        eventually(lambda: site.provider.list("Machine"))
        if stages == 5:
            eventually(lambda: (site.folder(ref) / "kubeconfig").exists())
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    assert "Lease" in str(site.provider.left())
    (found,) = site.another().discover()
    assert found.name == ref.name
    site.gone(found)


def test_a_place_alone_is_found_and_freed(site: Site) -> None:
    """A worker that died between its place and its Cluster."""
    ref = site.ref()
    site.provisioner._take_place(ref)
    assert [one.name for one in site.provisioner.discover()] == [ref.name]
    site.gone(ref)


# --- A management cluster that is away --------------------------------------------------------------------------------


def test_a_management_cluster_that_is_away_for_a_while_ends_no_making(site: Site, own: Lab) -> None:
    site.conduct.stages, ref = 3, site.ref()
    with ThreadPoolExecutor(1) as threads:
        making = threads.submit(site.create, ref)
        eventually(lambda: "its control plane is there" in site.told)
        with away(own):
            time.sleep(16)  # longer than one answer and all patience of one question
            assert not making.done()
        site.conduct.stages = 5
        assert making.result(timeout=90).exists()
    site.gone(ref)


def test_what_cannot_be_asked_is_neither_there_nor_gone(site: Site, own: Lab) -> None:
    ref = site.ref()
    site.create(ref)
    with away(own):
        with pytest.raises(NotYetDestroyed):
            site.provisioner.destroy(ref)
        with pytest.raises(ClusterError):
            list(site.provisioner.discover())
        (said,) = site.provisioner.lacks()
        assert said.startswith("a management cluster that answers")
    eventually(lambda: site.provisioner.lacks() == ())
    assert [one.name for one in site.provisioner.discover()] == [ref.name]  # the control
    site.gone(ref)
