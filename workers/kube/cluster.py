"""One cluster, as its API server has it: objects, watches, and commands in containers.

All that we ask can be asked twice, and is, when an answer does not come (`connection.py`): an object's name is made
from its run, so a create that finds it there with our own labels on it was applied the first time, when only its answer
got lost. A command is asked for again only while it cannot have begun.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlencode

import urllib3
from urllib3.exceptions import HTTPError

from service.core.boundary import Listener
from workers.kube import exec_
from workers.kube.connection import JSON, PATIENCE_S, PAUSE_S, Access, Answer, Connection
from workers.kube.errors import ClusterError, NotBegun, Taken
from workers.kube.exec_ import ExecEnded
from workers.kube.manifests import Manifest

if TYPE_CHECKING:
    from kubernetes.client import Configuration

OWNER = "blastdoor"
"""The field manager under which we apply."""
_NOT_FOUND, _GONE = 404, 410
_QUOTA_IN_USE = "Conflict"
"""The reason of a 409 for something new: not that it is there, but that two were counted against a quota at once."""
_SILENT_S = 30.0
"""A watch that is silent for longer is begun anew: nobody says that a connection is dead."""
_APPLY = "application/apply-patch+yaml"
_DIAL_AGAIN_S = 0.25
_AT_ONCE = 8
T = TypeVar("T")

_PATHS = {  # kind -> (apiVersion, plural, in a namespace)
    "ClusterRole": ("rbac.authorization.k8s.io/v1", "clusterroles", False),
    "ClusterRoleBinding": ("rbac.authorization.k8s.io/v1", "clusterrolebindings", False),
    "ConfigMap": ("v1", "configmaps", True),
    "Event": ("v1", "events", True),
    "FlowSchema": ("flowcontrol.apiserver.k8s.io/v1", "flowschemas", False),
    "LimitRange": ("v1", "limitranges", True),
    "MutatingAdmissionPolicy": ("admissionregistration.k8s.io/v1", "mutatingadmissionpolicies", False),
    "MutatingAdmissionPolicyBinding": ("admissionregistration.k8s.io/v1", "mutatingadmissionpolicybindings", False),
    "Namespace": ("v1", "namespaces", False),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies", True),
    "Node": ("v1", "nodes", False),
    "Pod": ("v1", "pods", True),
    "PriorityClass": ("scheduling.k8s.io/v1", "priorityclasses", False),
    "PriorityLevelConfiguration": ("flowcontrol.apiserver.k8s.io/v1", "prioritylevelconfigurations", False),
    "ResourceQuota": ("v1", "resourcequotas", True),
    "Role": ("rbac.authorization.k8s.io/v1", "roles", True),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings", True),
    "RuntimeClass": ("node.k8s.io/v1", "runtimeclasses", False),
    "ServiceAccount": ("v1", "serviceaccounts", True),
    "ValidatingAdmissionPolicy": ("admissionregistration.k8s.io/v1", "validatingadmissionpolicies", False),
    "ValidatingAdmissionPolicyBinding": (
        "admissionregistration.k8s.io/v1", "validatingadmissionpolicybindings", False,
    ),
}  # fmt: skip


class Cluster:
    """One API server. Any number of threads may use one; make one in each process: connections do not survive a fork.

    What the API server answers, and what happens on the way to it, is raised as ClusterError or one of its kinds:
    `Denied`, `Taken`, `Unreachable`.
    """

    def __init__(
        self, configuration: "Configuration", *, patience_s: float = PATIENCE_S, acting_as: str | None = None
    ) -> None:
        self._connection = Connection(Access.by(configuration), patience_s=patience_s, acting_as=acting_as)

    @classmethod
    def from_kubeconfig(cls, path: Path, *, patience_s: float = PATIENCE_S, acting_as: str | None = None) -> "Cluster":
        """As the user of the current context, or as another whom that user may impersonate. What is put in the file's
        place later is found when it is needed."""
        cluster = cls.__new__(cls)
        cluster._connection = Connection(
            Access.read(path), renew=lambda: Access.read(path), patience_s=patience_s, acting_as=acting_as
        )
        return cluster

    @property
    def server(self) -> str:
        """The URL of the API server."""
        return str(self._connection.access.configuration.host)

    @property
    def authority(self) -> bytes | None:
        """What signs the API server's certificate, in PEM; None: whom this machine trusts anyway."""
        return self._connection.access.authority

    def close(self) -> None:
        self._connection.close()

    # --- Objects ------------------------------------------------------------------------------------------------------

    def apply(self, manifest: Manifest, *, owner: str = OWNER, dry_run: bool = False) -> Manifest:
        """Server-side apply -> the object as it now stands. Makes it, or takes over what the manifest names."""
        query = {"fieldManager": owner, "force": "true"} | _dry(dry_run)
        return self._connection.ask("PATCH", _path_of(manifest), query=query, body=manifest, content=_APPLY).body

    def create(self, manifest: Manifest, *, ours: Mapping[str, str] | None = None, dry_run: bool = False) -> Manifest:
        """-> the object. When it is there already, and all labels in `ours` stand on it, it is the one that we made;
        else Taken."""
        folder, _, name = _path_of(manifest).rpartition("/")
        query = {"fieldManager": OWNER} | _dry(dry_run)
        give_up = time.monotonic() + self._connection.patience_s
        while True:
            try:
                return self._connection.ask("POST", folder, query=query, body=manifest).body
            except Taken as error:
                found = self._get(f"{folder}/{name}")
                if found is None and error.reason == _QUOTA_IN_USE and time.monotonic() < give_up:
                    time.sleep(PAUSE_S)
                    continue
                if found is None or not ours or not ours.items() <= (found["metadata"].get("labels") or {}).items():
                    raise
                return found

    def get(self, kind: str, name: str, namespace: str | None = None) -> Manifest | None:
        """None when it is not there."""
        return self._get(path(kind, namespace, name))

    def list(
        self, kind: str, namespace: str | None = None, *, labels: Mapping[str, str] | None = None
    ) -> list[Manifest]:
        """Of one namespace, or of all."""
        return _items(kind, self._connection.ask("GET", path(kind, namespace), query=_chosen(labels)).body)

    def delete(
        self, kind: str, name: str, namespace: str | None = None, *, uid: str | None = None, grace_s: int | None = None
    ) -> None:
        """Asks for its end; absent is success. With `uid`, only that very object: another that took its name meanwhile
        is left alone, which is success as well."""
        body: Manifest = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            self._connection.ask("DELETE", path(kind, namespace, name), body=body)
        except Taken:
            found = self.get(kind, name, namespace)
            if found is not None and (uid is None or found["metadata"]["uid"] == uid) and not _is_ending(found):
                raise
        except ClusterError as error:
            if error.status != _NOT_FOUND:
                raise

    def watch(
        self,
        kind: str,
        namespace: str | None = None,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        since: Manifest | None = None,
        seconds: float,
    ) -> Iterator[tuple[str, Manifest]]:
        """ADDED for all that is there, then what changes, as (ADDED | MODIFIED | DELETED, object); ends after so many
        seconds. With `since`, an object as it was read, only what changed after that. When the connection is lost it
        goes on, with an ADDED for each object anew; no DELETED is missed."""
        deadline = time.monotonic() + seconds
        chosen = _chosen(labels) | ({"fieldSelector": f"metadata.name={name}"} if name else {})
        known: dict[str, Manifest] = {since["metadata"]["uid"]: since} if since is not None else {}
        version = since["metadata"]["resourceVersion"] if since is not None else ""
        while True:
            for what, found in self._follow(path(kind, namespace), chosen, version, deadline):
                if what == "DELETED":
                    known.pop(found["metadata"]["uid"], None)
                else:
                    known[found["metadata"]["uid"]] = found
                yield what, found
            if time.monotonic() >= deadline:
                return
            time.sleep(PAUSE_S)
            listed = self._connection.ask("GET", path(kind, namespace), query=chosen).body
            version, now = listed["metadata"]["resourceVersion"], _items(kind, listed)
            there = {one["metadata"]["uid"]: one for one in now}
            for gone in known.keys() - there.keys():
                yield "DELETED", known[gone]
            known = there
            yield from (("ADDED", one) for one in now)

    def _follow(
        self, where: str, chosen: Mapping[str, str], version: str, deadline: float
    ) -> Iterator[tuple[str, Manifest]]:
        """One connection's worth. Without a version to start from, a watch begins with all that is there."""
        left = deadline - time.monotonic()
        if left <= 0:
            return
        query = {**chosen, "watch": "true", "timeoutSeconds": str(max(1, round(left)))}
        query |= {"resourceVersion": version} if version else {}
        try:
            response = self._connection.stream(where, query=query, silent_s=min(left, _SILENT_S))
        except ClusterError as error:
            if error.status != _GONE:
                raise
            return
        with closing(response), suppress(HTTPError, OSError):  # then the caller looks again
            for line in _lines(response):
                event = json.loads(line)
                if event["type"] == "ERROR":  # too old to go on from
                    return
                yield event["type"], event["object"]

    # --- A command in a container -------------------------------------------------------------------------------------

    def exec_(
        self,
        namespace: str,
        pod: str,
        container: str,
        argv: Sequence[str],
        *,
        stdin: Iterable[bytes] | None = None,
        on_output: Listener,
        deadline: float,
        stop: Callable[[], bool] = lambda: False,
        begins: Callable[[], None] = lambda: None,
    ) -> ExecEnded:
        """Runs a command to its end; see `exec_.pump`. `begins` is called when it is about to begin. Until then it is
        asked for again, as everything is; afterwards never: it may have run."""
        query = [("container", container), ("stdout", "true"), ("stderr", "true")]
        query += [("stdin", "true")] if stdin is not None else []
        query += [("command", word) for word in argv]
        where = f"{path('Pod', namespace, pod)}/exec?{urlencode(query)}"
        asked = time.monotonic()
        while True:
            try:
                connection = self._connection.upgraded(where, protocols=exec_.PROTOCOLS)
                break
            except NotBegun as error:
                patient = self._connection.is_patient(error, since=asked, pause_s=_DIAL_AGAIN_S)
                if not patient or time.monotonic() + _DIAL_AGAIN_S > deadline:
                    raise
                time.sleep(_DIAL_AGAIN_S)
        begins()
        try:
            return exec_.pump(connection, stdin=stdin or (), on_output=on_output, deadline=deadline, stop=stop)
        finally:
            connection.shutdown()  # type: ignore[no-untyped-call]  # `close` would wait for the other side

    # --- Any other question -------------------------------------------------------------------------------------------

    def raw(self, method: str, where: str, *, body: Manifest | None = None, content: str = JSON) -> Answer:
        """One request to any path, with the answer's headers: for a check of the API server itself, and for kinds that
        others define."""
        return self._connection.ask(method, where, body=body, content=content)

    def _get(self, where: str) -> Manifest | None:
        try:
            return self._connection.ask("GET", where).body
        except ClusterError as error:
            if error.status == _NOT_FOUND:
                return None
            raise


def together(asks: Sequence[Callable[[], T]]) -> list[T]:
    """All at once -> their answers, in order. When every one has ended, raises what the first of those that failed
    did."""
    with ThreadPoolExecutor(max_workers=min(len(asks), _AT_ONCE)) as threads:
        answers = [threads.submit(ask) for ask in asks]
    return [answer.result() for answer in answers]


def path(kind: str, namespace: str | None = None, name: str | None = None) -> str:
    """-> the path of an object, or of all of a kind: in one namespace, or everywhere."""
    version, plural, namespaced = _PATHS[kind]
    parts = ["api" if version == "v1" else "apis", version]
    parts += ["namespaces", quote(namespace, safe="")] if namespaced and namespace else []
    return "/" + "/".join([*parts, plural, *([quote(name, safe="")] if name else [])])


def _path_of(manifest: Manifest) -> str:
    metadata = manifest["metadata"]
    return path(manifest["kind"], metadata.get("namespace"), metadata["name"])


def _items(kind: str, listed: Manifest) -> list[Manifest]:
    """A list leaves out what it is one of."""
    return [{"apiVersion": _PATHS[kind][0], "kind": kind} | item for item in listed["items"]]


def _chosen(labels: Mapping[str, str] | None) -> dict[str, str]:
    return {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())} if labels else {}


def _dry(wanted: bool) -> dict[str, str]:
    return {"dryRun": "All"} if wanted else {}


def _is_ending(manifest: Manifest) -> bool:
    return "deletionTimestamp" in manifest["metadata"]


def _lines(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    left = b""
    for data in response.stream(None):
        *whole, left = (left + data).split(b"\n")
        yield from filter(None, whole)
