"""compose.yaml as processes of this machine: its environments, its commands, its PostgreSQL roles, its Redis users, and
for what builds boundaries its capabilities and its seccomp profile.

Only what a container would have of its own is put in its place: addresses, ports and directories.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psycopg
import redis
import yaml
from psycopg import sql

from tests.contained import argv_of
from tests.servers import LOOPBACK, ONCE, PostgresServer, _conninfo, _free_port, _program, _wait_until
from workers.boundaries.gvisor.cgroups import CgroupTree

ROOT = Path(__file__).parents[1]
COMPOSE, DEPLOY = ROOT / "compose.yaml", ROOT / "deploy"
ROLES = ("api", "relay", "webhooks", "worker", "reaper")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)(?::([?-])([^}]*))?\}")
_STOPPED_WITHIN_S = 20.0


@cache
def compose() -> Mapping[str, Any]:
    """As it is written, anchors resolved, variables not."""
    parsed: Mapping[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return parsed


def rendered(text: str, variables: Mapping[str, str]) -> str:
    """`${NAME}`, `${NAME:?why}` and `${NAME:-default}`, as compose does it. Raises KeyError(why)."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if name in variables:
            return variables[name]
        if kind != "-":
            raise KeyError(f"{name}: {rest}")
        return str(rest)

    return _VARIABLE.sub(value, text)


def environment_of(service: str, variables: Mapping[str, str]) -> dict[str, str]:
    given: Mapping[str, str] = compose()["services"][service].get("environment", {})
    return {name: rendered(str(value), variables) for name, value in given.items()}


def make_secrets(directory: Path) -> dict[str, str]:
    """What scripts/secrets.sh writes."""
    file = directory / "env"
    subprocess.run([ROOT / "scripts" / "secrets.sh", file], check=True, stdout=subprocess.DEVNULL)
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


def make_roles(server: PostgresServer, variables: Mapping[str, str], *, prefix: str) -> None:
    """Run deploy/postgres-roles.sh, as the image does when its database is made."""
    where = {"PGHOST": LOOPBACK, "PGPORT": str(server.port), "PGUSER": "postgres", "PGPASSWORD": server.password}
    own = {"BLASTDOOR_DATABASE_ROLES": prefix, "PATH": os.environ["PATH"]}
    env, script = environment_of("postgres", variables) | where | own, DEPLOY / "postgres-roles.sh"
    made = subprocess.run([script], env=env, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr


@dataclass(frozen=True)
class RedisWithUsers:
    """`users`: its ACL file."""

    port: int
    pid: int
    variables: Mapping[str, str]
    users: str

    def url(self, user: str) -> str:
        return f"redis://{user}:{self.variables[f'REDIS_{user.upper()}_PASSWORD']}@{LOOPBACK}:{self.port}/0"

    def client(self, user: str) -> "redis.Redis":
        return redis.Redis.from_url(self.url(user), decode_responses=True, retry=ONCE, protocol=2)


@contextmanager
def redis_with_users(variables: Mapping[str, str]) -> Iterator[RedisWithUsers]:
    """The Redis of compose.yaml: its command with its environment."""
    _program("redis-server", package="redis-server")
    port = _free_port()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bd-redis-")))
        replaced = {"/deploy/redis.sh": str(DEPLOY / "redis.sh"), "/data": str(directory), "*": LOOPBACK}
        argv = [replaced.get(word, word) for word in compose()["services"]["redis"]["command"]]
        env = environment_of("redis", variables) | {"TMPDIR": str(directory), "PATH": os.environ["PATH"]}
        process = Process("redis", [*argv, "--port", str(port)], env=env, directory=directory)
        stack.callback(process.end)
        health = redis.Redis(host=LOOPBACK, port=port, username="health", password="none", retry=ONCE, protocol=2)
        stack.enter_context(health)
        _wait_until(health.ping, process.popen, log=process.log, not_yet=redis.ConnectionError)
        (users,) = directory.glob("tmp.*")
        yield RedisWithUsers(port, process.pid, variables, users.read_text())


class Host:
    """What two hosts do not share: a mount namespace where each hierarchy of control groups begins at a group of this
    host's. Its processes have mounts of their own there, as containers have, but for those in `shared`."""

    def __init__(self, name: str, *, shared: Path) -> None:
        self._groups = [root / name for root in set(CgroupTree.detect().roots.values())]
        for group in self._groups:
            group.mkdir()
        shared.mkdir(mode=0o700)
        over = " && ".join(
            [f"mount --bind {group} {group.parent}" for group in self._groups]
            + [f"mount --bind {shared} {shared}", f"mount --make-rshared {shared}"]
        )
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private",
             "sh", "-c", f"{over} && echo ready && exec sleep infinity"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"

    @property
    def entering(self) -> list[str]:
        """Goes before a command that is to run there."""
        own_mounts = ["unshare", "--mount", "--propagation", "unchanged"]
        return ["nsenter", f"--target={self._holder.pid}", "--mount", f"--wd={ROOT}", *own_mounts]

    def end(self) -> None:
        assert self._holder.stdout is not None
        self._holder.kill()
        self._holder.wait()
        self._holder.stdout.close()
        for group in self._groups:
            group.rmdir()


class Process:
    """A service's command, as a session of its own that dies with this one."""

    def __init__(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], directory: Path) -> None:
        self.name, self.log = name, directory / f"{name}.log"
        self.env = env
        with self.log.open("wb") as output:
            self.popen = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv], env=dict(env), stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.popen.pid

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """It, and whatever of its session is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()

    def end(self) -> None:
        """Politely, and then not."""
        self.popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(_STOPPED_WITHIN_S)
        self.kill()


@dataclass
class Deployment:
    """Its processes by name: the service's, and behind a slash the site's."""

    directory: Path
    variables: Mapping[str, str]
    postgres: PostgresServer
    prefix: str
    redis: RedisWithUsers
    processes: dict[str, Process] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    def database_url(self, role: str) -> str:
        """`role`: one of ROLES, or owner."""
        password = self.variables[f"POSTGRES_{role.upper()}_PASSWORD"]
        return f"postgresql+psycopg://{self.prefix}_{role}:{password}@{LOOPBACK}:{self.postgres.port}/{self.prefix}"

    def environment(self, service: str, *, site: str = "") -> dict[str, str]:
        """As compose.yaml has it, with this machine's addresses, ports and directories."""
        env = environment_of(service, self.variables | ({"BLASTDOOR_SITE": site} if site else {}))
        here = {
            "@postgres:5432/blastdoor": f"@{LOOPBACK}:{self.postgres.port}/{self.prefix}",
            "//blastdoor_": f"//{self.prefix}_",
            "@redis:6379": f"@{LOOPBACK}:{self.redis.port}",
            "0.0.0.0:9100": f"{LOOPBACK}:{_free_port()}",
        }
        for there, ours in here.items():
            env = {name: value.replace(there, ours) for name, value in env.items()}
        own = {"BLASTDOOR_HOST": LOOPBACK, "BLASTDOOR_PORT": str(_free_port()), "BLASTDOOR_DATABASE_ROLES": self.prefix}
        env |= {name: value for name, value in own.items() if name in env}
        env["BLASTDOOR_STATE_DIR"] = str(self.directory / "state")
        env["BLASTDOOR_RUNTIME_DIR"] = self.runtime_dir(site)
        return env | {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"} | self.settings

    def runtime_dir(self, site: str) -> str:
        return f"/run/bd-{self.prefix}-{site}"  # short: a socket's path in it has to fit

    def argv(self, service: str) -> list[str]:
        """Its command with its capabilities and its profile; not its user, who may not read this checkout."""
        described = compose()["services"][service]
        command = [sys.executable if word == "python" else word for word in described["command"]]
        options = dict(option.split(":", 1) for option in described["security_opt"])
        profile = ROOT / options["seccomp"] if "seccomp" in options else None
        return argv_of(command, capabilities=described.get("cap_add", ()), profile=profile)

    def start(self, service: str, *, site: str = "") -> Process:
        """`site`: on a host of that name."""
        name, argv = service, self.argv(service)
        if site:
            if site not in self.hosts:
                self.hosts[site] = Host(f"bd-{self.prefix}-{site}", shared=Path(self.runtime_dir(site)))
            name, argv = f"{service}-{site}", [*self.hosts[site].entering, *argv]
        env = self.environment(service, site=site)
        self.processes[name] = Process(name, argv, env=env, directory=self.directory)
        return self.processes[name]

    def run(self, service: str, *words: str) -> str:
        """Its command, with `words` behind it, to its end. -> its standard output."""
        argv, env = [*self.argv(service), *words], self.environment(service)
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def is_healthy(self, name: str) -> bool:
        """What its health check says, asked where its ports are."""
        process = self.processes[name]
        test = compose()["services"][name.partition("-")[0]]["healthcheck"]["test"]
        assert test[:2] == ["CMD", "python"], test
        ports = {"127.0.0.1:9100": process.env["BLASTDOOR_METRICS_ADDRESS"]}
        if "BLASTDOOR_PORT" in process.env:
            ports["127.0.0.1:8700"] = f"{LOOPBACK}:{process.env['BLASTDOOR_PORT']}"
        words = [sys.executable, *test[2:]]
        for there, ours in ports.items():
            words = [word.replace(there, ours) for word in words]
        return subprocess.run(words, capture_output=True, check=False, timeout=30).returncode == 0

    def client(self, key: str) -> httpx.Client:
        url = f"http://{LOOPBACK}:{self.processes['api'].env['BLASTDOOR_PORT']}"
        return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """As the owner."""
        with psycopg.connect(self.database_url("owner").replace("+psycopg", "")) as connection:
            return connection.execute(query).fetchall()

    def told(self) -> str:
        return "\n".join(f"--- {one.name}\n{one.said()[-3000:]}" for one in self.processes.values())

    def end(self) -> None:
        """All at once, the reapers last: they look once more when they are asked to end."""
        for reapers in (False, True):
            some = [one for name, one in self.processes.items() if name.startswith("reaper") is reapers]
            for process in some:
                process.popen.terminate()
            for process in some:
                process.end()
        while self.hosts:
            self.hosts.popitem()[1].end()


@contextmanager
def deployed(directory: Path, postgres: PostgresServer, **settings: str) -> Iterator[Deployment]:
    """Servers, roles and tables; no process of ours yet."""
    variables = make_secrets(directory)
    prefix = f"t{secrets.token_hex(4)}"
    make_roles(postgres, variables, prefix=prefix)
    try:
        with redis_with_users(variables) as server:
            deployment = Deployment(directory, variables, postgres, prefix, server, settings=settings)
            deployment.run("migrate")
            try:
                yield deployment
            finally:
                deployment.end()
    finally:
        with psycopg.connect(_conninfo(postgres.port, postgres.password), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(prefix)))
