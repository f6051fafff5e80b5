"""What is planted around a boundary before anything is played in it: canaries that only this process knows.

A leak is a token that appears where it must not, so "nothing was reached" is shown, not assumed. Each token says where
it was planted. Listeners that this host itself cannot reach are left out: they would hear nothing anyway.
"""

import os
import secrets
import selectors
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ENVIRONMENT_NAME = "CANARY_OF_BLASTDOOR"  # no setting's: one that begins with BLASTDOOR_ has to be known
_LISTEN_S = 0.2
_PROVE_S = 2.0


def new_token() -> str:
    return f"bdcanary{secrets.token_hex(16)}"


class Ears:
    """TCP and UDP listeners on the loopback and on this host's own address. A TCP caller is answered with a token."""

    def __init__(self, token: str) -> None:
        self._answer = f"HTTP/1.0 200 OK\r\n\r\n{token}\n".encode()
        self._heard: set[str] = set()
        self._selector = selectors.DefaultSelector()
        self._stop = threading.Event()
        self.targets: tuple[tuple[str, int], ...] = ()

    @contextmanager
    def open(self) -> Iterator["Ears"]:
        with ExitStack() as stack:
            stack.callback(self._selector.close)
            bound = [target for address in _addresses() if (target := self._bind(address, stack)) is not None]
            thread = threading.Thread(target=self._listen, name="conformance-ears", daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(self._stop.set)
            self.targets = tuple(target for target in bound if self._proved(target))
            self.take()
            yield self

    def take(self) -> tuple[str, ...]:
        """What was heard since the last time."""
        heard, self._heard = self._heard, set()
        return tuple(sorted(heard))

    def _bind(self, address: str, stack: ExitStack) -> tuple[str, int] | None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            tcp = stack.enter_context(socket.create_server((address, 0), family=family))
            port = tcp.getsockname()[1]
            udp = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            udp.bind((address, port))
        except OSError:  # no such address here
            return None
        tcp.setblocking(False)
        udp.setblocking(False)
        self._selector.register(tcp, selectors.EVENT_READ, f"tcp {address}")
        self._selector.register(udp, selectors.EVENT_READ, f"udp {address}")
        return address, port

    def _listen(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(_LISTEN_S):
                ear = key.fileobj
                assert isinstance(ear, socket.socket)
                try:
                    if ear.type == socket.SOCK_DGRAM:
                        ear.recv(2048)
                    else:
                        connection, _caller = ear.accept()
                        with connection:
                            connection.sendall(self._answer)
                except OSError:
                    continue
                self._heard.add(str(key.data))

    def _proved(self, target: tuple[str, int]) -> bool:
        """The control of every listener: this host itself reaches it, and it answers."""
        try:
            with socket.create_connection(target, timeout=_PROVE_S) as connection:
                return connection.recv(4096) != b""
        except OSError:
            return False


def _addresses() -> list[str]:
    """The loopback's, and the one this host would send from (nothing is sent)."""
    found = ["127.0.0.1", "::1"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            found.append(probe.getsockname()[0])
        except OSError:
            pass
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Stage:
    """`tokens`: where each was planted. `given`: the one token that controls give to a guest themselves. `mark`: text
    that a guest may know, by which what it made is found again. `nearby`: addresses close to a boundary that is not
    made on this host: its nodes, its API server, a listener of ours."""

    host_file: Path
    ears: Ears
    mark: str
    given: str
    tokens: Mapping[str, str] = field(repr=False)
    nearby: tuple[tuple[str, int], ...] = ()

    def leaks(self, *texts: bytes) -> tuple[str, ...]:
        """Where the tokens in these texts had been planted."""
        return tuple(where for where, token in self.tokens.items() if any(token.encode() in text for text in texts))


@contextmanager
def set_stage() -> Iterator[Stage]:
    """Plants, and takes away again. To be entered before a driver starts its first process, which would inherit."""
    places = ("a file of the host", "the environment of the runner", "another run", "a listener of the host")
    tokens = {place: new_token() for place in places} | {"the step's own": new_token()}
    before = os.environ.get(ENVIRONMENT_NAME)
    with tempfile.TemporaryDirectory(prefix="blastdoor-conformance-") as directory:
        Path(directory).chmod(0o755)  # whoever finds it may read it: only the wall is to be in the way
        host_file = Path(directory) / "canary"
        host_file.write_text(tokens["a file of the host"])
        host_file.chmod(0o644)
        os.environ[ENVIRONMENT_NAME] = tokens["the environment of the runner"]
        try:
            with Ears(tokens["a listener of the host"]).open() as ears:
                mark = f"bdmark{secrets.token_hex(8)}"
                yield Stage(host_file=host_file, ears=ears, mark=mark, given=tokens["the step's own"], tokens=tokens)
        finally:
            if before is None:
                del os.environ[ENVIRONMENT_NAME]
            else:
                os.environ[ENVIRONMENT_NAME] = before
