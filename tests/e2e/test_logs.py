"""The logs of a whole installation, from its start to its end, while guests and clients write what looks like them.

D35 of the corpus: what a guest prints is no log record, no event, and no line of a log.
"""

import json
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import redis

from tests.stack import NoStack, Stack, eventually, finished, run_stack, submit

PROGRAMS = ("api", "relay", "webhooks", "reaper", "worker")
RECORD = {"event", "level", "timestamp", "program"}
MARK = "forgedbyaguest"
FORGED = f'{{"event":"{MARK}","level":"error","timestamp":"2026-01-01T00:00:00Z","program":"worker"}}'
CLIENTS_WORD = "clientsword"
pytestmark = pytest.mark.timeout(240)


@dataclass
class Seen:
    """What is left of one that has been stopped."""

    logs: dict[str, list[str]]
    secrets: list[str]
    run_id: str


def hostile(stack: Stack) -> str:
    """A guest, clients and somebody on the broker who do what they can. -> the run."""
    wild = f"printf '\\033]0;x\\007\\r\\n%s\\n::set-env name=A::b\\n' '{FORGED}'"
    steps = (f"printf '%s\\n' '{FORGED}' >&2; {wild}; exit 3", ["/no/such/program\n" + FORGED])
    run_id = submit(stack.tenant, *steps, name=MARK, metadata={"a": FORGED})
    finished(stack.tenant, run_id)
    url = urlsplit(stack.ready["url"])
    with httpx.Client(base_url=stack.ready["url"], trust_env=False) as client:
        client.get(f"/v1/{CLIENTS_WORD}%0a{FORGED}%0d%1b[2J%e2%80%a8", params={"key": stack.ready["tenant_key"]})
        client.get("/v1/runs", headers={"Authorization": f"Bearer {stack.ready['admin_key']}", "X-Request-ID": "a\tb"})
        client.get(f"/v1/{stack.ready['service_key']}", headers={"traceparent": FORGED})
    with socket.create_connection((url.hostname or "", url.port or 0)) as raw:
        raw.sendall(b"\x1b[2J" + FORGED.encode() + b"\r\n\r\n")
        raw.settimeout(30)
        raw.recv(1000)
    with redis.Redis.from_url(stack.ready["redis_url"]) as broker:
        delivery = {"exchange": "", "routing_key": "boundary.gvisor"}
        properties = {"delivery_info": delivery, "delivery_tag": "x", "body_encoding": ""}
        message = {"body": FORGED, "content-type": FORGED, "content-encoding": "utf-8", "headers": {}}
        message["properties"] = properties
        broker.lpush("boundary.gvisor", json.dumps(message))
    log = stack.state / "logs" / "worker.log"
    assert eventually(lambda: "message_dropped" in log.read_text())
    return run_id


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    directory = tmp_path_factory.mktemp("logged")
    try:
        with run_stack(directory, BLASTDOOR_METRICS_ADDRESS="127.0.0.1:0") as stack:
            secrets = [stack.ready[name] for name in ("tenant_key", "service_key", "admin_key")]
            secrets += passwords(stack)
            run_id = hostile(stack)
    except NoStack as lacking:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(lacking))
    return Seen({name: split(directory / "state" / "logs" / f"{name}.log") for name in PROGRAMS}, secrets, run_id)


def passwords(stack: Stack) -> list[str]:
    """Redis' of the operator and of the processes, and the key of webhooks' secrets, from a process' environment."""
    environment = Path(f"/proc/{stack.children['api']}/environ").read_bytes().decode().split("\0")
    values = dict(line.partition("=")[::2] for line in environment if line)
    urls = (stack.ready["redis_url"], values["BLASTDOOR_REDIS_URL"])
    found = [urlsplit(url).password or "" for url in urls] + values["BLASTDOOR_SECRETS_KEY"].split(",")
    assert all(len(secret) > 20 for secret in found)
    return found


def split(log: Path) -> list[str]:
    """As `tail` shows it: only a newline ends a line."""
    return log.read_bytes().decode("utf-8").split("\n")[:-1]


def impure(program: str, lines: Iterable[str]) -> list[str]:
    """Lines that are no record of this program's."""
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            found.append(line)
            continue
        honest = isinstance(record, dict) and record.keys() >= RECORD and record["program"] == program
        if not honest or not re.fullmatch("[ -~]+", line) or MARK in str(record["event"]):
            found.append(line)
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_line_from_start_to_end_is_a_record_of_its_program(seen: Seen, program: str) -> None:
    assert seen.logs[program], "it said something"
    assert impure(program, seen.logs[program]) == []


def test_control_what_would_be_a_forgery_is_seen() -> None:
    honest = json.dumps({"event": "a", "level": "info", "timestamp": "t", "program": "api", "text": FORGED})
    assert impure("api", [honest]) == []
    banner, trace = " -------------- celery@x v5.7", "Traceback (most recent call last):"
    others = [honest.replace(*words) for words in (('"a"', f'"{MARK}"'), ("api", "worker"), ("info", "\x1b[31m"))]
    for line in (FORGED, "", "[]", banner, trace, *others):
        assert impure("api", [line]) == [line]


def test_what_strangers_wrote_is_there_and_only_as_a_value(seen: Seen) -> None:
    records = {name: [json.loads(line) for line in lines] for name, lines in seen.logs.items()}
    paths = [record["path"] for record in records["api"] if record["event"] == "request"]
    assert any(CLIENTS_WORD in path and FORGED in path for path in paths)
    (dropped,) = (record for record in records["worker"] if record["event"] == "message_dropped")
    assert dropped["content_type"] == FORGED[:100]
    words = {str(record["event"]) for of_program in records.values() for record in of_program}
    assert not {word for word in words if MARK in word or CLIENTS_WORD in word}
    assert all(record["level"] in {"debug", "info", "warning", "error", "critical"} for record in records["worker"])


def test_no_secret_is_in_any_of_them(seen: Seen) -> None:
    everything = "\n".join(line for lines in seen.logs.values() for line in lines)
    assert "bd_s_[hidden]" in everything, "one was pasted into a path, which is logged"
    assert seen.run_id in everything, "the search finds what is there"
    assert len(seen.secrets) >= 6
    assert [secret for secret in seen.secrets if secret in everything] == []


def test_what_libraries_say_is_in_the_same_form(seen: Seen) -> None:
    said = [json.loads(line) for line in (*seen.logs["worker"], *seen.logs["api"])]
    loggers = {record["logger"].split(".")[0] for record in said if record["event"] == "library"}
    assert {"celery", "uvicorn"} <= loggers
    assert any("superuser" in str(record.get("message")) for record in said), "Celery's warning, of many lines"
