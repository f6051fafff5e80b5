"""Cluster API's way to a cluster, against a real API server with its own resource definitions. Who makes machines is
played (`capi_provider.py`); what the engine asks, may, sees and leaves is real."""

import base64
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.errors import BoundaryError, NotYetDestroyed, ProvisionFailed
from service.core.ids import new_run_id
from tests.cluster.capi_provider import Conduct, Provider, install, provider
from tests.cluster.lab.definitions import CORE, DEVELOPMENT, Definitions, definitions
from tests.cluster.lab.outside import Lab
from tests.cluster.lab.parts import NoParts
from tests.cluster.namespaces import GIVEN
from tests.cluster.pods import eventually
from tests.sandboxes import Never
from tests.summary import ran
from workers.boundaries.cluster.capi import CapiHost, CapiProvisioner
from workers.kube import Cluster, ClusterError, Manifest, filled, placeholders
from workers.kube.manifests import FOLDER

TEMPLATES = FOLDER / "capi"
LABEL = "cluster.x-k8s.io/cluster-name"
GARBAGE = b"this: is\nno: kubeconfig\n"


class Flag:
    """A Cancellation that a test sets."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def is_set(self) -> bool:
        return self.event.is_set()


@dataclass
class Site:
    """A management cluster with one namespace, its provider, and the engine's own provisioner."""

    provider: Provider
    admin: Cluster
    provisioner: CapiProvisioner
    told: list[str]

    @property
    def conduct(self) -> Conduct:
        return self.provider.conduct

    def ref(self, *, run_id: str | None = None, fence: int = 1) -> BoundaryRef:
        return BoundaryRef(
            installation=self.provisioner.host.installation, kind=BoundaryKind.CLUSTER, variant="capi", site="here",
            tenant="acme", run_id=run_id or new_run_id(), fence=fence,
            expires_at=datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=600),
        )  # fmt: skip

    def create(self, ref: BoundaryRef) -> Path:
        return self.provisioner.create(ref, cancelled=Never(), tell=self.told.append)

    def another(self, **change: object) -> CapiProvisioner:
        """In another process, as far as it can know."""
        return CapiProvisioner(replace(self.provisioner.host, **change))  # type: ignore[arg-type]

    def folder(self, ref: BoundaryRef) -> Path:
        return self.provisioner.host.state / "clusters" / ref.name

    def gone_of(self, ref: BoundaryRef) -> None:
        """Destroyed, however often it takes."""
        deadline = time.monotonic() + 90
        while True:
            try:
                return self.provisioner.destroy(ref)
            except NotYetDestroyed:
                assert time.monotonic() < deadline

    def gone(self, ref: BoundaryRef) -> None:
        """Destroyed, and nothing left in the namespace."""
        self.gone_of(ref)
        assert self.provider.left() == []
        assert list(self.provisioner.discover()) == []
        assert not self.folder(ref).exists()


def defined(*of: Definitions) -> list[Manifest]:
    """Where they cannot be had, a skip."""
    try:
        return [one for each in of for one in definitions(each, print)]
    except NoParts as why:
        pytest.skip(f"no definitions of Cluster API: {why}")


@pytest.fixture(scope="module")
def management(kubeconfig: Path) -> Iterator[Cluster]:
    """With Cluster API's definitions, and no controller of it."""
    admin = Cluster.from_kubeconfig(kubeconfig)
    install(admin, defined(CORE, DEVELOPMENT))
    ran("boundary", "cluster/capi (its providers are played)")
    yield admin
    admin.close()


@pytest.fixture
def site(management: Cluster, kubeconfig: Path, tmp_path: Path) -> Iterator[Site]:
    with sites(management, kubeconfig, tmp_path) as one:
        yield one


@contextmanager
def sites(admin: Cluster, kubeconfig: Path, folder: Path, *, rights: tuple[str, ...] = ("engine",)) -> Iterator[Site]:
    conduct = Conduct(kubeconfig=kubeconfig.read_bytes())
    with provider(kubeconfig, conduct) as played:
        for manifest in class_of_ours():
            manifest["metadata"]["namespace"] = played.namespace
            post(admin, manifest)
        host = CapiHost(
            installation=f"test{uuid.uuid4().hex[:12]}", site="here", namespace=played.namespace, topology=None,
            kubeconfig=engine(admin, played.namespace, folder / "engine.kubeconfig", rights=rights),
            max_clusters=2, state=folder / "state", ready_s=60,
        )  # fmt: skip
        provisioner = CapiProvisioner(host)
        yield Site(played, admin, provisioner, [])
        played.conduct.lets_go, played.conduct.orphans = True, False
        with suppress(BoundaryError):
            for ref in provisioner.discover():
                provisioner.destroy(ref)
        provisioner.close()


def class_of_ours() -> list[Manifest]:
    return list(yaml.safe_load_all((TEMPLATES / "class" / "class.yaml").read_text()))


def post(admin: Cluster, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
    """Strictly: what the definitions do not know is an error, not left out."""
    version, kind = manifest["apiVersion"], manifest["kind"]
    listed = admin.raw("GET", f"/apis/{version}").body["resources"]
    plural = next(one["name"] for one in listed if one["kind"] == kind and "/" not in one["name"])
    where = f"/apis/{version}/namespaces/{manifest['metadata']['namespace']}/{plural}?fieldValidation=Strict"
    return admin.raw("POST", where + ("&dryRun=All" if dry_run else ""), body=manifest).body


def engine(admin: Cluster, namespace: str, path: Path, *, rights: tuple[str, ...]) -> Path:
    """-> the kubeconfig of a user who has the rights of our templates, and no others."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "engine", "namespace": namespace}}
    admin.apply(account)
    values = {"namespace": namespace, "engine": f"system:serviceaccount:{namespace}:engine"}
    for name in rights:
        for one in yaml.safe_load_all((TEMPLATES / "rbac" / f"{name}.yaml").read_text()):
            admin.apply(filled(one, {key: values[key] for key in placeholders(one)}))
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 7200}}
    where = f"/api/v1/namespaces/{namespace}/serviceaccounts/engine/token"
    token = eventually(lambda: admin.raw("POST", where, body=request).body["status"]["token"])
    text = kubeconfig_with(admin, token)
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def kubeconfig_with(admin: Cluster, token: str) -> str:
    assert admin.authority is not None
    cluster = {"server": admin.server, "certificate-authority-data": base64.b64encode(admin.authority).decode()}
    return json.dumps(
        {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
    )  # fmt: skip


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
        [sys.executable, "-m", "tests.cluster.test_capi_flow", ref.model_dump_json(), *arguments(site)],
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


def arguments(site: Site) -> list[str]:
    host = site.provisioner.host
    return [host.installation, str(host.kubeconfig), host.namespace, str(host.state)]


def test_a_place_alone_is_found_and_freed(site: Site) -> None:
    """A worker that died between its place and its Cluster."""
    ref = site.ref()
    site.provisioner._take_place(ref)
    assert [one.name for one in site.provisioner.discover()] == [ref.name]
    site.gone(ref)


# --- A management cluster that is away --------------------------------------------------------------------------------


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Lab:
    """The lab that is the management cluster: one that was given is not ours to stop."""
    if any(os.environ.get(variable) for variable in GIVEN):
        pytest.skip("stops an API server: only the lab's own")
    lab: Lab = request.getfixturevalue("lab")
    return lab


@contextmanager
def away(lab: Lab) -> Iterator[None]:
    """Its API server answers nobody, as one does that is overloaded or cut off."""
    pid = lab.pid("kube-apiserver")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


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


# --- Deletion ---------------------------------------------------------------------------------------------------------


def test_an_end_that_is_held_up_is_said_with_what_holds_it_and_comes_once_it_is_let_go(site: Site) -> None:
    ref = site.ref()
    site.create(ref)
    site.conduct.lets_go = False
    with pytest.raises(NotYetDestroyed, match=r"held by cluster\.cluster\.x-k8s\.io.*still attached to a volume"):
        site.provisioner.destroy(ref)
    assert not site.folder(ref).exists()  # nobody shall use it any more
    assert [one.name for one in site.provisioner.discover()] == [ref.name]
    began = time.monotonic()
    with pytest.raises(NotYetDestroyed):
        site.provisioner.destroy(ref)
    assert time.monotonic() - began < 10  # what has resisted keeps the reaper from nothing else
    site.conduct.lets_go = True
    site.gone(ref)


def test_a_machine_that_outlives_its_cluster_is_not_overlooked(site: Site) -> None:
    ref = site.ref()
    site.create(ref)
    site.conduct.orphans = True
    with pytest.raises(NotYetDestroyed, match=f"Machine {ref.name}-0"):
        site.provisioner.destroy(ref)
    assert site.provider.list("Cluster") == []
    assert [one.name for one in site.provisioner.discover()] == [ref.name]  # by its place
    site.provider.let_all_go()
    site.gone(ref)


def test_another_installations_cluster_is_left_alone(site: Site) -> None:
    ref = site.ref()
    site.create(ref)
    stranger = site.another(installation="another0")
    theirs = ref.model_copy(update={"installation": "another0"})
    assert list(stranger.discover()) == []
    stranger.destroy(ref)
    stranger.destroy(theirs)
    with pytest.raises(ProvisionFailed, match="and not of this run"):
        stranger.create(theirs, cancelled=Never(), tell=site.told.append)
    assert len(site.provider.left()) == 5
    (cluster,) = site.provider.list("Cluster")
    assert "deletionTimestamp" not in cluster["metadata"]
    stranger.close()
    site.gone(ref)  # the control: its own may


def test_a_newer_cluster_of_that_name_is_left_alone(site: Site) -> None:
    """Somebody deleted ours, and made another that only has its name."""
    ref = site.ref()
    manifest = {
        "apiVersion": "cluster.x-k8s.io/v1beta2", "kind": "Cluster",
        "metadata": {"name": ref.name, "namespace": site.provider.namespace},
        "spec": {"topology": {"classRef": {"name": "blastdoor"}, "version": "v1.36.2"}},
    }  # fmt: skip
    post(site.admin, manifest)
    site.provisioner.destroy(ref)
    with pytest.raises(ProvisionFailed, match="and not of this run"):
        site.create(ref)
    (cluster,) = site.provider.list("Cluster")
    assert "deletionTimestamp" not in cluster["metadata"]


# --- So many at once --------------------------------------------------------------------------------------------------


def test_no_more_clusters_than_there_are_places_whoever_asks_at_once(site: Site) -> None:
    """Six workers, two places: two get one, the others are told at once."""
    refs = [site.ref() for _ in range(6)]
    provisioners = [site.another() for _ in refs]

    def make(at: int) -> str:
        try:
            provisioners[at].create(refs[at], cancelled=Never(), tell=lambda _: None, patience_s=0)
        except ProvisionFailed as error:
            return str(error)
        return "made"

    with ThreadPoolExecutor(6) as threads:
        said = list(threads.map(make, range(6)))
    assert sorted(said) == ["after 0 s there are 2 clusters, and no more are allowed at once"] * 4 + ["made"] * 2
    assert site.provider.most == 2
    made = [ref for ref, word in zip(refs, said, strict=True) if word == "made"]
    with ThreadPoolExecutor(1) as threads:  # the control: a place that is free again goes to who waits for it
        waits = threads.submit(site.create, site.ref())
        eventually(lambda: site.told == ["waiting for another cluster to go"])
        site.gone_of(made[0])
        assert waits.result(timeout=90).exists()
    for one in provisioners:
        one.close()


def test_a_cluster_that_is_being_deleted_still_has_its_place(site: Site) -> None:
    site.conduct.lets_go, one = False, site.another(max_clusters=1)
    ref = site.ref()
    one.create(ref, cancelled=Never(), tell=lambda _: None, patience_s=0)
    with pytest.raises(NotYetDestroyed):
        one.destroy(ref)
    with pytest.raises(ProvisionFailed, match="there are 1 clusters"):
        one.create(site.ref(), cancelled=Never(), tell=lambda _: None, patience_s=0)
    one.close()


def test_a_cap_that_was_lowered_counts_what_is_there(site: Site) -> None:
    first, second = site.ref(), site.ref()
    site.create(first)
    site.create(second)
    site.gone_of(first)  # its place is free, and has a lower number than the other's
    one = site.another(max_clusters=1)
    with pytest.raises(ProvisionFailed, match="there are 1 clusters"):
        one.create(site.ref(), cancelled=Never(), tell=lambda _: None, patience_s=0)
    one.close()


def _be_a_worker() -> None:
    """The process that is killed."""
    ref, installation, kubeconfig, namespace, state = sys.argv[1:]
    host = CapiHost(
        installation=installation, site="here", kubeconfig=Path(kubeconfig), namespace=namespace, topology=None,
        max_clusters=2, state=Path(state), ready_s=600,
    )  # fmt: skip
    CapiProvisioner(host).create(BoundaryRef.model_validate_json(ref), cancelled=Never(), tell=print)
    time.sleep(600)


if __name__ == "__main__":
    _be_a_worker()
