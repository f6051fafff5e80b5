"""Prometheus: a registry for each process, and its `/metrics` on a port of its own (setting `metrics_address`).

Only composition roots read this. What is counted is said beside what counts it: `service.api.metrics`,
`service.relay.metrics`, `workers.metrics`. No label is a tenant, a run, or a word that a guest or a customer chose, so
the number of series is bounded; `docs/operations.md` lists them all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import structlog
from prometheus_client import CollectorRegistry, Metric, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily

from service.core.errors import BlastdoorError

log = structlog.get_logger()


@dataclass(frozen=True)
class Address:
    """Where a process is scraped. `host` is an IP address; port 0 picks a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address | None":
        """As the setting has it, which is checked there: `127.0.0.1:9100`, `[::1]:9100`; empty is None."""
        host, _, port = text.rpartition(":")
        return cls(host.removeprefix("[").removesuffix("]"), int(port)) if text else None

    def beside(self, n: int) -> "Address":
        """The n-th port after this one; port 0 stays 0."""
        return Address(self.host, self.port + n if self.port else 0)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class BuildInfo:
    """`blastdoor_build_info`: always 1, with what this process is."""

    def __init__(self, program: str) -> None:
        self._program = program

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "blastdoor_build_info", "Always 1; which process this is, and its version.", labels=("program", "version")
        )
        info.add_metric((self._program, installed_version()), 1)
        yield info


def new_registry(program: str) -> CollectorRegistry:
    """With what every process says of itself: `blastdoor_build_info`, and memory, CPU and descriptors (`process_...`).
    `program`: api, relay, webhooks, worker, reaper."""
    registry = CollectorRegistry()
    registry.register(BuildInfo(program))
    ProcessCollector(registry=registry)
    return registry


def serve(registry: CollectorRegistry, address: Address) -> Address:
    """In daemon threads, until the process ends. -> the address with the port that was taken. Raises BlastdoorError
    when it is not free: an operator who asked for metrics would not see that there are none."""
    try:
        server, _ = start_http_server(address.port, addr=address.host, registry=registry)
    except OSError as error:
        raise BlastdoorError(f"metrics cannot be served on {address}: {error.strerror or error}") from error
    return Address(address.host, server.server_port)


def serve_if_asked(registry: CollectorRegistry, asked: str) -> None:
    """`asked`: the setting. Says in the log where they are. Raises BlastdoorError."""
    address = Address.parse(asked)
    if address is not None:
        log.info("metrics_served", address=str(serve(registry, address)))


def installed_version() -> str:
    try:
        return version("blastdoor")
    except PackageNotFoundError:  # a source tree that was not installed
        return "0"
