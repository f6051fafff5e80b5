"""A management cluster of the tests: the lab with Cluster API's definitions, a provider that is played, and the engine
with no more than the rights of our templates."""

import base64
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.errors import BoundaryError, NotYetDestroyed
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
from workers.kube import Cluster, Manifest, filled, placeholders
from workers.kube.manifests import FOLDER

TEMPLATES = FOLDER / "capi"


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
            max_clusters=2, state=folder / "state", ready_s=60, development=True,
        )  # fmt: skip
        provisioner = CapiProvisioner(host)
        eventually(lambda: not provisioner.lacks(), lambda: str(provisioner.lacks()))  # rights take a moment
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


def arguments(site: Site) -> list[str]:
    host = site.provisioner.host
    return [host.installation, str(host.kubeconfig), host.namespace, str(host.state)]


def _be_a_worker() -> None:
    """The process that is killed."""
    ref, installation, kubeconfig, namespace, state = sys.argv[1:]
    host = CapiHost(
        installation=installation, site="here", kubeconfig=Path(kubeconfig), namespace=namespace, topology=None,
        max_clusters=2, state=Path(state), ready_s=600, development=True,
    )  # fmt: skip
    CapiProvisioner(host).create(BoundaryRef.model_validate_json(ref), cancelled=Never(), tell=print)
    time.sleep(600)


if __name__ == "__main__":
    _be_a_worker()
