"""Our own Redis: on loopback, with passwords, in the state directory. Its configuration goes in by standard input, so
that no password stands on a command line or in a file; and it holds only their hashes.
"""

import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import redis

LOOPBACK = "127.0.0.1"

# What kombu and the relay really use. The rest of the dangerous commands (CONFIG, MODULE, DEBUG, REPLICAOF, FLUSHALL,
# KEYS, ...) is for whoever holds the operator's URL: two Lua escapes (CVE-2022-0543, CVE-2025-49844) and Celery's own
# history (CVE-2021-23727) say why a process that handles strangers' requests should not have it.
_PROCESSES = "~* &* +@all -@admin -@dangerous +info"


@dataclass(frozen=True)
class RedisPlan:
    """One server. `process_url` is for our processes, `operator_url` for the people who own the machine."""

    port: int
    directory: Path
    process_password: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    operator_password: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    @property
    def process_url(self) -> str:
        return f"redis://blastdoor:{self.process_password}@{LOOPBACK}:{self.port}/0"

    @property
    def operator_url(self) -> str:
        return f"redis://default:{self.operator_password}@{LOOPBACK}:{self.port}/0"


def redis_answers(plan: RedisPlan) -> bool:
    """Whether it is there and is ours: another server on this port does not know the password."""
    with redis.Redis.from_url(plan.operator_url, socket_timeout=2.0, retry=None) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def render_configuration(plan: RedisPlan) -> str:
    """The server's whole configuration. `#` and 64 hex digits is Redis' way to give a password's SHA-256."""
    lines = [
        f"bind {LOOPBACK}",
        f"port {plan.port}",
        "protected-mode yes",
        "daemonize no",
        "supervised no",
        'logfile ""',
        f"dir {_quoted(plan.directory)}",
        "databases 1",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",
        f"user default on #{_sha256(plan.operator_password)} ~* &* +@all",
        f"user blastdoor on #{_sha256(plan.process_password)} {_PROCESSES}",
    ]
    return "\n".join(lines) + "\n"


def _sha256(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()


def _quoted(path: Path) -> str:
    """As Redis reads a double-quoted word. Raises ValueError for a path that is not one line of UTF-8."""
    text = str(path)
    if not text.isprintable():
        raise ValueError(f"the state directory's path cannot be given to Redis: {text!r}")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
