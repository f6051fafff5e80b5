"""One cluster's API server, asked with the official client's configuration: kubeconfig, client certificates, tokens
that are renewed, credential plugins.

What goes wrong on the way is tried again for as long as we have patience: no answer, 429, 5xx. That is safe since all
that we ask can be asked twice: an object's name is made from its run, so a create that finds it there with our own
labels on it was applied the first time, when only its answer got lost.
"""

import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode, urlsplit

import urllib3
import websocket
import yaml
from urllib3.exceptions import HTTPError

from service.core.boundary import Listener
from workers.kube import exec_
from workers.kube.errors import ClusterError, Denied, Taken, Unreachable
from workers.kube.exec_ import ExecEnded
from workers.kube.manifests import Manifest

if TYPE_CHECKING:
    from kubernetes.client import Configuration

OWNER = "blastdoor"
"""The field manager under which we apply."""
CONNECT_S, ANSWER_S = 5.0, 10.0
PATIENCE_S = 45.0
"""An API server that is away for half a minute ends no run."""
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_OK, _NOT_FOUND, _CONFLICT, _TOO_MANY, _SERVER = range(200, 300), 404, 409, 429, 500
_QUOTA_IN_USE = "Conflict"
"""The reason of a 409 for something new: not that it is there, but that two were counted against a quota at once."""
_SILENT_S = 30.0
"""A watch that is silent for longer is begun anew: nobody says that a connection is dead."""
_JSON, _APPLY = "application/json", "application/apply-patch+yaml"

_loading = threading.Lock()

_PATHS = {  # kind -> (apiVersion, plural, in a namespace)
    "ClusterRole": ("rbac.authorization.k8s.io/v1", "clusterroles", False),
    "ClusterRoleBinding": ("rbac.authorization.k8s.io/v1", "clusterrolebindings", False),
    "ConfigMap": ("v1", "configmaps", True),
    "Event": ("v1", "events", True),
    "FlowSchema": ("flowcontrol.apiserver.k8s.io/v1", "flowschemas", False),
    "LimitRange": ("v1", "limitranges", True),
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


@dataclass(frozen=True)
class Answer:
    """`headers` have the API server's own marks, such as the flow schema that a request was counted under."""

    body: Manifest
    headers: Mapping[str, str]


class Cluster:
    """A connection to one API server. Make one in each process: connections do not survive a fork.

    What the API server answers, and what happens on the way to it, is raised as ClusterError or one of its kinds:
    `Denied`, `Taken`, `Unreachable`.
    """

    def __init__(
        self, configuration: "Configuration", *, patience_s: float = PATIENCE_S, acting_as: str | None = None
    ) -> None:
        if not configuration.verify_ssl:
            raise ClusterError("a kubeconfig with insecure-skip-tls-verify is not taken")
        self._configuration = configuration
        self._patience_s = patience_s
        self._acting_as = {"Impersonate-User": acting_as} if acting_as else {}
        self.authority = Path(configuration.ssl_ca_cert).read_bytes() if configuration.ssl_ca_cert else None
        """What signs the API server's certificate, in PEM; None: whom this machine trusts anyway."""
        self._tls = ssl.create_default_context(cadata=self.authority.decode() if self.authority else None)
        self._tls.verify_flags &= ~ssl.VERIFY_X509_STRICT  # many clusters' authorities have no key identifiers
        if configuration.cert_file:
            self._tls.load_cert_chain(configuration.cert_file, configuration.key_file)
        name = configuration.tls_server_name
        self._pool = urllib3.PoolManager(
            ssl_context=self._tls, maxsize=8, retries=False, **({"server_hostname": name} if name else {})
        )

    @classmethod
    def from_kubeconfig(cls, path: Path, *, patience_s: float = PATIENCE_S, acting_as: str | None = None) -> "Cluster":
        """As the user of the current context, or as another whom that user may impersonate."""
        from kubernetes import client, config  # half a second, for who asks a cluster

        configuration = client.Configuration()  # its proxy, the environment's for the world outside, is not used
        # The client writes what is inside to files, and remembers them for all of its process.
        with _loading, tempfile.TemporaryDirectory(prefix="blastdoor-") as keys:
            try:
                config.load_kube_config(
                    str(path), client_configuration=configuration, persist_config=False, temp_file_path=keys
                )
                return cls(configuration, patience_s=patience_s, acting_as=acting_as)
            except (config.ConfigException, OSError, ValueError, yaml.YAMLError) as error:
                raise ClusterError(f"{path} cannot be used as a kubeconfig: {error}") from error

    @property
    def server(self) -> str:
        """The URL of the API server."""
        return str(self._configuration.host)

    def close(self) -> None:
        self._pool.clear()

    # --- Objects ------------------------------------------------------------------------------------------------------

    def apply(self, manifest: Manifest, *, owner: str = OWNER, dry_run: bool = False) -> Manifest:
        """Server-side apply -> the object as it now stands. Makes it, or takes over what the manifest names."""
        query = {"fieldManager": owner, "force": "true"} | _dry(dry_run)
        return self._ask("PATCH", _path_of(manifest), query=query, body=manifest, content=_APPLY).body

    def create(self, manifest: Manifest, *, ours: Mapping[str, str] | None = None, dry_run: bool = False) -> Manifest:
        """-> the object. When it is there already, and all labels in `ours` stand on it, it is the one that we made;
        else Taken."""
        folder, _, name = _path_of(manifest).rpartition("/")
        query = {"fieldManager": OWNER} | _dry(dry_run)
        give_up = time.monotonic() + self._patience_s
        while True:
            try:
                return self._ask("POST", folder, query=query, body=manifest).body
            except Taken as error:
                found = self._get(f"{folder}/{name}")
                if found is None and error.reason == _QUOTA_IN_USE and time.monotonic() < give_up:
                    time.sleep(_PAUSE_S)
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
        version = _PATHS[kind][0]
        items = self._ask("GET", path(kind, namespace), query=_chosen(labels)).body["items"]
        return [{"apiVersion": version, "kind": kind} | item for item in items]  # a list leaves out what it is one of

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
            self._ask("DELETE", path(kind, namespace, name), body=body)
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
        seconds: float,
    ) -> Iterator[tuple[str, Manifest]]:
        """ADDED for all that is there, then what changes, as (ADDED | MODIFIED | DELETED, object); ends after so many
        seconds. When the connection is lost it goes on, with an ADDED for each object anew."""
        deadline = time.monotonic() + seconds
        chosen = _chosen(labels) | ({"fieldSelector": f"metadata.name={name}"} if name else {})
        known: dict[str, Manifest] = {}
        while True:
            for what, found in self._follow(path(kind, namespace), chosen, deadline):
                if what == "DELETED":
                    known.pop(found["metadata"]["uid"], None)
                else:
                    known[found["metadata"]["uid"]] = found
                yield what, found
            if time.monotonic() >= deadline:
                return
            time.sleep(_PAUSE_S)
            listed = self._ask("GET", path(kind, namespace), query=chosen).body["items"]
            there = {item["metadata"]["uid"] for item in listed}
            for gone in known.keys() - there:
                yield "DELETED", known.pop(gone)

    def _follow(self, where: str, chosen: Mapping[str, str], deadline: float) -> Iterator[tuple[str, Manifest]]:
        """One connection's worth. Without a version to start from, a watch begins with all that is there."""
        left = deadline - time.monotonic()
        if left <= 0:
            return
        query = {**chosen, "watch": "true", "timeoutSeconds": str(max(1, round(left)))}
        response = self._connected("GET", where, query=query, read_s=min(left, _SILENT_S))
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
    ) -> ExecEnded:
        """Runs a command to its end; see `exec_.pump`. It is never tried again: it may have run."""
        query = [("container", container), ("stdout", "true"), ("stderr", "true")]
        query += [("stdin", "true")] if stdin is not None else []
        query += [("command", word) for word in argv]
        where = f"{path('Pod', namespace, pod)}/exec?{urlencode(query)}"
        connection = self._websocket(where)
        try:
            return exec_.pump(connection, stdin=stdin or (), on_output=on_output, deadline=deadline, stop=stop)
        finally:
            connection.shutdown()  # type: ignore[no-untyped-call]  # `close` would wait for the other side

    def _websocket(self, where: str) -> websocket.WebSocket:
        server = urlsplit(self._configuration.host)
        port = server.port or (443 if server.scheme == "https" else 80)
        connection = websocket.WebSocket(skip_utf8_validation=True)
        headers = [f"{name}: {value}" for name, value in self._authorization().items()]
        try:
            sock = socket.create_connection((server.hostname, port), timeout=CONNECT_S)
            try:
                if server.scheme == "https":
                    named = self._configuration.tls_server_name or server.hostname
                    sock = self._tls.wrap_socket(sock, server_hostname=named)
                sock.settimeout(ANSWER_S)
                connection.connect(  # type: ignore[no-untyped-call]
                    f"ws{self._configuration.host.removeprefix('http')}{where}",
                    socket=sock, header=headers, subprotocols=list(exec_.PROTOCOLS), suppress_origin=True,
                    redirect_limit=0,
                )  # fmt: skip
            except BaseException:
                sock.close()
                raise
        except websocket.WebSocketBadStatusException as error:
            raise _error(error.status_code, error.resp_body or b"") from error
        except (websocket.WebSocketException, OSError) as error:
            raise Unreachable(f"no connection for a command: {error}") from error
        return connection

    # --- Asking -------------------------------------------------------------------------------------------------------

    def raw(self, method: str, where: str, *, body: Manifest | None = None) -> Answer:
        """One request to any path, with the answer's headers: for a check of the API server itself."""
        return self._ask(method, where, body=body)

    def _get(self, where: str) -> Manifest | None:
        try:
            return self._ask("GET", where).body
        except ClusterError as error:
            if error.status == _NOT_FOUND:
                return None
            raise

    def _ask(
        self,
        method: str,
        where: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content: str = _JSON,
    ) -> Answer:
        response = self._connected(method, where, query=query, body=body, content=content)
        try:
            return Answer(json.loads(response.data or b"{}"), dict(response.headers))
        except ValueError as error:
            raise ClusterError(f"{method} {where}: no JSON was answered", status=response.status) from error

    def _connected(
        self,
        method: str,
        where: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content: str = _JSON,
        read_s: float | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """The first answer that is none of "later". With `read_s` its body is not read yet, and may take so long."""
        url = f"{self._configuration.host}{where}" + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body)
        give_up, pause = time.monotonic() + self._patience_s, _PAUSE_S
        while True:
            headers = {"Accept": _JSON, "Content-Type": content, "User-Agent": OWNER, **self._authorization()}
            try:
                response = self._pool.request(
                    method, url, body=data, headers=headers, preload_content=read_s is None,
                    timeout=urllib3.Timeout(connect=CONNECT_S, read=ANSWER_S if read_s is None else read_s),
                )  # fmt: skip
                if response.status in _OK:
                    return response
                error = _error(response.status, response.data)
                after = response.headers.get("Retry-After", "")
                response.close()
            except (HTTPError, OSError) as failure:
                error, after = Unreachable(f"{method} {where}: {failure}"), ""
                error.__cause__ = failure
            if not isinstance(error, Unreachable) or time.monotonic() + pause > give_up:
                raise error
            time.sleep(min(max(float(after), pause), _LONGEST_PAUSE_S) if after.isdigit() else pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _authorization(self) -> dict[str, str]:
        """Asked for each request: the client renews what has run out."""
        tokens = {one["key"]: one["value"] for one in self._configuration.auth_settings().values() if one["value"]}
        return tokens | self._acting_as


def path(kind: str, namespace: str | None = None, name: str | None = None) -> str:
    """-> the path of an object, or of all of a kind: in one namespace, or everywhere."""
    version, plural, namespaced = _PATHS[kind]
    parts = ["api" if version == "v1" else "apis", version]
    parts += ["namespaces", quote(namespace, safe="")] if namespaced and namespace else []
    return "/" + "/".join([*parts, plural, *([quote(name, safe="")] if name else [])])


def _path_of(manifest: Manifest) -> str:
    metadata = manifest["metadata"]
    return path(manifest["kind"], metadata.get("namespace"), metadata["name"])


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


def _error(status: int, raw: bytes) -> ClusterError:
    """From the `Status` object in an answer; a proxy between us may have sent something else."""
    try:
        said = json.loads(raw)
    except ValueError:
        said = {"message": raw[:200].decode("utf-8", "replace")}
    said = said if isinstance(said, dict) else {}
    detail, reason = str(said.get("message") or f"HTTP {status}"), str(said.get("reason", ""))
    if status in {401, 403}:
        return Denied(detail, status=status, reason=reason)
    if status == _CONFLICT:
        return Taken(detail, status=status, reason=reason)
    if status == _TOO_MANY or status >= _SERVER:
        return Unreachable(detail, status=status, reason=reason)
    return ClusterError(detail, status=status, reason=reason)
