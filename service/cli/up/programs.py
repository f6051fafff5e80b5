"""What `blastdoor up` starts, as data: argument lists without secrets, environments with nothing that was not meant."""

import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service.cli.up.children import Program
from service.cli.up.redis import LOOPBACK, RedisPlan, render_configuration
from service.cli.up.state import StateDirectory
from service.settings import Settings

SECRETS_KEY = "BLASTDOOR_SECRETS_KEY"
_PLAIN = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
# -I: neither the caller's environment nor its directory decides which modules are imported. -u: logs as they happen.
_PYTHON = (sys.executable, "-I", "-u", "-m")


@dataclass(frozen=True)
class Plan:
    """Everything that was decided before the first process starts. `environment` has the settings as BLASTDOOR_...;
    only processes of the same user (and root) can read another's environment."""

    state: StateDirectory
    redis: RedisPlan
    settings: Settings
    environment: Mapping[str, str] = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.settings.port}"


def redis_server(plan: Plan) -> Program:
    program = shutil.which("redis-server") or "redis-server"
    return Program("redis", (program, "-"), _PLAIN, stdin=render_configuration(plan.redis).encode())


def processes(plan: Plan) -> Sequence[Program]:
    """In the order of starting. Celery takes a first SIGTERM as `finish what you have`, a second as `drop it`: the
    first is sent before the ladder begins."""
    return (
        Program("api", (*_PYTHON, "service.main"), _environment(plan, 0, seals=True)),
        Program("relay", (*_PYTHON, "service.relay"), _environment(plan, 1)),
        Program("webhooks", (*_PYTHON, "service.relay.webhooks"), _environment(plan, 2, seals=True)),
        Program("reaper", (*_PYTHON, "workers", "reaper"), _environment(plan, 3), ladder=((signal.SIGTERM, 20.0),)),
        Program("worker", (*_PYTHON, "workers", "worker"), _environment(plan, 4), ladder=((signal.SIGTERM, 5.0),)),
    )


def _environment(plan: Plan, n: int, *, seals: bool = False) -> Mapping[str, str]:
    """Each process is scraped at a port of its own, the n-th after the one that was asked for. The key that opens
    webhooks' secrets is for those two that seal and sign, and for nobody beside the sandboxes."""
    environment = {**_PLAIN, **plan.environment}
    if not seals:
        environment.pop(SECRETS_KEY, None)
    if address := plan.settings.metrics_address:
        host, _, port = address.rpartition(":")
        environment["BLASTDOOR_METRICS_ADDRESS"] = f"{host}:{int(port) + n if int(port) else 0}"
    return environment
