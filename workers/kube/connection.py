"""The way to one API server, by the official client's configuration: kubeconfig, client certificates, tokens that are
renewed, credential plugins.

What goes wrong on the way is tried again for as long as we have patience: no answer, 429, 5xx. A kubeconfig is read
anew when the API server does not know us any more, or is not to be found: somebody may have put a newer one there.
"""

import hashlib
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

import urllib3
import websocket
import yaml
from urllib3.exceptions import HTTPError

from workers.kube.errors import ClusterError, Denied, NoKubeconfig, NotBegun, Taken, Unreachable
from workers.kube.manifests import Manifest

if TYPE_CHECKING:
    from kubernetes.client import Configuration

USER_AGENT = "blastdoor"
CONNECT_S, ANSWER_S = 5.0, 10.0
PATIENCE_S = 45.0
"""An API server that is away for half a minute ends no run."""
PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
JSON = "application/json"
_OK, _UNKNOWN, _FORBIDDEN, _CONFLICT, _TOO_MANY, _SERVER = range(200, 300), 401, 403, 409, 429, 500

_loading = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """`headers` have the API server's own marks, such as the flow schema that a request was counted under."""

    body: Manifest
    headers: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Access:
    """What one reading of a kubeconfig gives. `digest`: of all that leads there and says who we are."""

    configuration: "Configuration"
    tls: ssl.SSLContext
    pool: urllib3.PoolManager
    authority: bytes | None
    digest: str

    @classmethod
    def by(cls, configuration: "Configuration") -> "Access":
        """While the files that it names are there. Raises ClusterError, OSError, ValueError."""
        if not configuration.verify_ssl:
            raise ClusterError("a kubeconfig with insecure-skip-tls-verify is not taken")
        files = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
        contents = [Path(file).read_bytes() if file else b"" for file in files]
        authority = contents[0] or None
        tls = ssl.create_default_context(cadata=authority.decode() if authority else None)
        tls.verify_flags &= ~ssl.VERIFY_X509_STRICT  # many clusters' authorities have no key identifiers
        if configuration.cert_file:
            tls.load_cert_chain(configuration.cert_file, configuration.key_file)
        name = configuration.tls_server_name
        pool = urllib3.PoolManager(
            ssl_context=tls, maxsize=8, retries=False, **({"server_hostname": name} if name else {})
        )
        identity = [configuration.host, name, configuration.api_key, *(part.hex() for part in contents)]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return cls(configuration, tls, pool, authority, digest)

    @classmethod
    def read(cls, path: Path) -> "Access":
        """Of the current context. Raises NoKubeconfig, in one line."""
        from kubernetes import client, config  # half a second, for who asks a cluster

        configuration = client.Configuration()  # its proxy, the environment's for the world outside, is not used
        # The client writes what is inside to files, and remembers them for all of its process.
        with _loading, tempfile.TemporaryDirectory(prefix="blastdoor-") as keys:
            try:
                _look_over(yaml.safe_load(path.read_bytes()))
                config.load_kube_config(
                    str(path), client_configuration=configuration, persist_config=False, temp_file_path=keys
                )
                server = urlsplit(configuration.host)
                if server.scheme not in ("https", "http") or not server.hostname:
                    raise ValueError(f"its server is no URL such as https://HOST:6443: {configuration.host!r}")
                return cls.by(configuration)
            except OSError as error:
                why = error.strerror or str(error)
                named = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
                raise NoKubeconfig(f"{path} cannot be used as a kubeconfig: {why}{named}") from error
            except yaml.YAMLError as error:
                raise NoKubeconfig(f"{path} cannot be used as a kubeconfig: no YAML: {_one_line(error)}") from error
            except (config.ConfigException, ClusterError, ValueError) as error:
                raise NoKubeconfig(f"{path} cannot be used as a kubeconfig: {_one_line(error)}") from error
            except (AttributeError, KeyError, TypeError) as error:  # the client does not look whether a list is one
                raise NoKubeconfig(f"{path} cannot be used as a kubeconfig: it has not a kubeconfig's form") from error


def _look_over(found: object) -> None:
    """Raises ValueError."""
    if found is None:
        raise ValueError("it is empty")
    if not isinstance(found, dict) or "clusters" not in found:
        raise ValueError("it has no clusters, as `kubectl config view` shows them")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Connection:
    """Any number of threads may use one; a fork may not.

    What the API server answers, and what happens on the way to it, is raised as ClusterError or one of its kinds.
    """

    def __init__(
        self, access: Access, *, renew: Callable[[], Access] | None = None, patience_s: float, acting_as: str | None
    ) -> None:
        self._access = access
        self._renew = renew
        self._lock = threading.Lock()
        self._acting_as = {"Impersonate-User": acting_as} if acting_as else {}
        self.patience_s = patience_s
        self._away_since: float | None = None
        self._away_at = 0.0

    @property
    def access(self) -> Access:
        """As of now: another may come in its place."""
        return self._access

    def close(self) -> None:
        self._access.pool.clear()

    def ask(
        self,
        method: str,
        where: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content: str = JSON,
    ) -> Answer:
        response = self._answered(method, where, query=query, body=body, content=content)
        try:
            return Answer(json.loads(response.data or b"{}"), dict(response.headers))
        except ValueError as error:
            raise ClusterError(f"{method} {where}: no JSON was answered", status=response.status) from error

    def stream(self, where: str, *, query: Mapping[str, str], silent_s: float) -> urllib3.BaseHTTPResponse:
        """An answer whose body is not read yet, and may pause for so long."""
        return self._answered("GET", where, query=query, silent_s=silent_s)

    def _answered(
        self,
        method: str,
        where: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content: str = JSON,
        silent_s: float | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """The first answer that is none of "later"."""
        data = None if body is None else json.dumps(body)
        began, pause = time.monotonic(), PAUSE_S
        access, known_anew = self._access, False
        while True:
            url = f"{access.configuration.host}{where}" + (f"?{urlencode(query)}" if query else "")
            headers = {"Accept": JSON, "Content-Type": content, "User-Agent": USER_AGENT, **self._authorization(access)}
            try:
                response = access.pool.request(
                    method, url, body=data, headers=headers, preload_content=silent_s is None,
                    timeout=urllib3.Timeout(connect=CONNECT_S, read=ANSWER_S if silent_s is None else silent_s),
                )  # fmt: skip
                self._away_since = None
                if response.status in _OK:
                    return response
                error = error_of(response.status, response.data)
                after = response.headers.get("Retry-After", "")
                response.close()
            except (HTTPError, OSError) as failure:
                error, after = Unreachable(f"{method} {where}: {failure}"), ""
                error.__cause__ = failure
            if error.status == _UNKNOWN and not known_anew and (newer := self._renewed(access)) is not None:
                access, known_anew = newer, True
                continue
            if not isinstance(error, Unreachable) or not self.is_patient(error, since=began, pause_s=pause):
                raise error
            time.sleep(min(max(float(after), pause), _LONGEST_PAUSE_S) if after.isdigit() else pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            if error.status == 0:
                access = self._renewed(access) or access

    def is_patient(self, error: Unreachable, *, since: float, pause_s: float) -> bool:
        """Whether what is asked since then (monotonic seconds), and failed so, is asked again after this pause.

        Each question has our patience with an API server that answers "later". One that is away is waited for once, by
        all that is asked meanwhile: whoever plays a run asks a dozen things more when its cluster is lost."""
        now = time.monotonic()
        if error.status == 0:
            with self._lock:
                if self._away_since is None or now - self._away_at > self.patience_s:
                    self._away_since = now
                self._away_at = now
                since = min(since, self._away_since)
        return now + pause_s <= since + self.patience_s

    def upgraded(self, where: str, *, protocols: Sequence[str]) -> websocket.WebSocket:
        """A websocket. Tried once. Raises NotBegun when the API server did not hear of it, or did not begin with it."""
        try:
            return self._upgraded(self._access, where, protocols)
        except Denied as error:
            if error.status != _UNKNOWN or (newer := self._renewed(self._access)) is None:
                raise
            return self._upgraded(newer, where, protocols)
        except NotBegun:
            self._renewed(self._access)
            raise

    def _upgraded(self, access: Access, where: str, protocols: Sequence[str]) -> websocket.WebSocket:
        connection = websocket.WebSocket(skip_utf8_validation=True)
        headers = [f"{name}: {value}" for name, value in self._authorization(access).items()]
        sock = _dialled(access)
        try:
            sock.settimeout(ANSWER_S)
            connection.connect(  # type: ignore[no-untyped-call]
                f"ws{access.configuration.host.removeprefix('http')}{where}",
                socket=sock, header=headers, subprotocols=list(protocols), suppress_origin=True, redirect_limit=0,
            )  # fmt: skip
        except websocket.WebSocketBadStatusException as error:
            self._away_since = None
            sock.close()
            said = error_of(error.status_code, error.resp_body or b"")
            if isinstance(said, Unreachable):
                raise NotBegun(str(said), status=said.status, reason=said.reason) from error
            raise said from error
        except (websocket.WebSocketException, OSError) as error:
            sock.close()
            raise Unreachable(f"no connection for a command: {error}") from error
        except BaseException:
            sock.close()
            raise
        self._away_since = None
        return connection

    def _renewed(self, known: Access) -> Access | None:
        """Another access than the one that was used, if there is one by now."""
        with self._lock:
            if self._access is not known:
                return self._access
            if self._renew is not None:
                with suppress(ClusterError):  # it may be half written
                    found = self._renew()
                    if found.digest != known.digest:
                        self._access = found
                        return found
        return None

    def _authorization(self, access: Access) -> dict[str, str]:
        """Asked for each request: the client renews what has run out."""
        with self._lock:
            settings = access.configuration.auth_settings().values()
        return {one["key"]: one["value"] for one in settings if one["value"]} | self._acting_as


def _dialled(access: Access) -> socket.socket:
    """Connected, and known to be to the right one; nothing was asked yet. Raises NotBegun."""
    server = urlsplit(access.configuration.host)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        sock = socket.create_connection((server.hostname, port), timeout=CONNECT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.scheme != "https":
            return sock
        try:
            return access.tls.wrap_socket(sock, server_hostname=access.configuration.tls_server_name or server.hostname)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise NotBegun(f"no connection for a command: {error}") from error


def error_of(status: int, raw: bytes) -> ClusterError:
    """From the `Status` object in an answer; a proxy between us may have sent something else."""
    try:
        said = json.loads(raw)
    except ValueError:
        said = {"message": raw[:200].decode("utf-8", "replace")}
    said = said if isinstance(said, dict) else {}
    detail, reason = str(said.get("message") or f"HTTP {status}"), str(said.get("reason", ""))
    if status in {_UNKNOWN, _FORBIDDEN}:
        return Denied(detail, status=status, reason=reason)
    if status == _CONFLICT:
        return Taken(detail, status=status, reason=reason)
    if status == _TOO_MANY or status >= _SERVER:
        return Unreachable(detail, status=status, reason=reason)
    return ClusterError(detail, status=status, reason=reason)
