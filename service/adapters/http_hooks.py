"""One POST to an address that nobody of ours chose. What may be connected to is decided here, at the socket.

httpcore and not a client on top of it: it follows no redirect, keeps no cookie, reads no proxy from the environment,
unpacks nothing. Below it is a network of our own that resolves a name once, judges every answer, connects to the judged
address and looks at what it is connected to. Host and SNI stay the name's. A connection is used once, so that the next
delivery is judged again.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpcore

from service.core.errors import BlastdoorError
from service.core.webhooks.addresses import Address
from service.core.webhooks.ports import Resolver
from service.core.webhooks.schedule import Answer, Fault
from service.core.webhooks.urls import Pairs, Target, UrlRefused, judge_answers, judge_url

TIMEOUT = timedelta(seconds=15)
"""For everything: resolving, connecting, the handshake, sending, and what is read of the answer."""
MAX_READ = 64 * 1024
_READ_AFTER_STATUS_S = 2.0
"""The status is the answer; what follows it is read for so long, to part in peace with a server that is writing."""
_MOST_ADDRESSES = 4
_RESOLVING_AT_ONCE = 256


def resolve(host: str, port: int) -> Sequence[Address]:
    """By the system's resolver. Implements webhooks.ports.Resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(ip_address(str(row[4][0])) for row in found))


class _Blocked(httpcore.ConnectError):
    """The address that the name leads to is not one to connect to."""


class _Unresolved(httpcore.ConnectError):
    """The name leads nowhere now."""


class HttpHooks:
    """Sends deliveries; of one event loop. `excepted`: host and port pairs that are not judged. `ca_file`: trusted
    beside the public authorities. Raises BlastdoorError for a file that is none."""

    def __init__(
        self, *, excepted: Pairs = frozenset(), ca_file: Path | None = None, timeout: timedelta = TIMEOUT,
        resolver: Resolver = resolve, user_agent: str = "Blastdoor-Webhooks/1",
    ) -> None:  # fmt: skip
        self._excepted = excepted
        self._timeout_s = timeout.total_seconds()
        self._user_agent = user_agent
        self._tls = httpcore.default_ssl_context()
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        if ca_file is not None:
            try:
                self._tls.load_verify_locations(cafile=ca_file)
            except OSError as error:  # ssl.SSLError is one
                raise BlastdoorError(f"the authorities in {ca_file} cannot be used: {error}") from error
        self._resolver = resolver
        # Threads of its own: names that resolve slowly must not hold up who asks the store.
        self._threads = ThreadPoolExecutor(_RESOLVING_AT_ONCE, thread_name_prefix="resolving")

    async def send(self, url: str, *, headers: Mapping[str, str], body: bytes) -> Answer:
        """Never raises for what the other side does: the answer says what came of it, within the time."""
        began = time.monotonic()
        try:
            target = judge_url(url, excepted=self._excepted)
        except UrlRefused:
            return Answer(error=Fault.BLOCKED_URL)
        status, retry_after, error = None, None, None
        try:
            async with asyncio.timeout(self._timeout_s):
                status, retry_after = await self._post(target, headers=headers, body=body)
        except (TimeoutError, httpcore.TimeoutException):
            error = Fault.TIMEOUT
        except _Blocked:
            error = Fault.BLOCKED_ADDRESS
        except _Unresolved:
            error = Fault.UNRESOLVED
        except (httpcore.NetworkError, OSError) as failure:
            error = Fault.TLS if _is_tls(failure) else Fault.CONNECT
        except (httpcore.ProtocolError, ValueError):
            error = Fault.PROTOCOL
        spent = timedelta(seconds=time.monotonic() - began)
        return Answer(status=status, error=error, retry_after=retry_after, duration=spent)

    def close(self) -> None:
        """Threads that still resolve are left behind."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _post(self, target: Target, *, headers: Mapping[str, str], body: bytes) -> tuple[int, str | None]:
        network = _JudgedNetwork(target, self._resolver, self._threads)
        url = httpcore.URL(
            scheme=target.scheme.encode(), host=_for_url(target), port=target.port, target=target.path.encode()
        )
        fixed = {
            "host": target.authority, "user-agent": self._user_agent, "accept": "*/*", "connection": "close",
            "content-length": str(len(body)),
        }  # fmt: skip
        async with httpcore.AsyncConnectionPool(
            ssl_context=self._tls, network_backend=network, max_keepalive_connections=0, retries=0
        ) as connections:
            request: dict[str, Any] = {"headers": [*fixed.items(), *headers.items()], "content": body}
            async with connections.stream("POST", url, **request) as response:
                names = {name.lower(): value for name, value in response.headers}
                retry_after = names.get(b"retry-after", b"").decode("latin-1") or None
                await _discard(response)
                return response.status, retry_after


async def _discard(response: httpcore.Response) -> None:
    """At most so much, for so long; what goes wrong here changes nothing, since the status has been said."""
    read = 0
    try:
        async with asyncio.timeout(_READ_AFTER_STATUS_S):
            async for chunk in response.aiter_stream():
                read += len(chunk)
                if read >= MAX_READ:
                    return
    except (TimeoutError, httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
        return


class _JudgedNetwork(httpcore.AsyncNetworkBackend):
    """For one delivery. What it is asked to connect to must be the target's own host and port."""

    def __init__(self, target: Target, resolver: Resolver, threads: ThreadPoolExecutor) -> None:
        self._target = target
        self._resolver = resolver
        self._threads = threads
        self._sockets = httpcore.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None,  # noqa: ASYNC109 - as httpcore has it
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:  # fmt: skip
        assert port == self._target.port
        answers = await self._resolve()
        if judge_answers(self._target, answers) is not None:
            raise _Blocked("an answer is not an address to connect to")
        failure: Exception = _Unresolved("no answer")
        for address in answers[:_MOST_ADDRESSES]:
            try:
                stream = await self._sockets.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
                continue
            if not _leads_to(stream, address, port):
                await stream.aclose()
                raise _Blocked("connected to something else than what was judged")
            return stream
        raise failure

    async def connect_unix_socket(self, path: str, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        raise _Blocked("a webhook goes to no socket of this host")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _resolve(self) -> Sequence[Address]:
        if self._target.address is not None:
            return [self._target.address]
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._resolver, self._target.host, self._target.port)
        except (OSError, UnicodeError) as error:
            raise _Unresolved(str(error)) from error


def _leads_to(stream: httpcore.AsyncNetworkStream, address: Address, port: int) -> bool:
    """getpeername() says what was judged."""
    peer = stream.get_extra_info("server_addr")
    return peer is not None and ip_address(str(peer[0])) == address and int(peer[1]) == port


def _for_url(target: Target) -> bytes:
    return target.host.encode("ascii")


def _is_tls(failure: BaseException | None) -> bool:
    while failure is not None:
        if isinstance(failure, ssl.SSLError):
            return True
        failure = failure.__cause__ or failure.__context__
    return False
