"""What a real sandbox printed and left, fetched over HTTP."""

import hashlib
import json
import random
import time
from urllib.parse import quote

import pytest

from service.core.names import read_back
from tests.stack import Stack, played, python

pytestmark = pytest.mark.timeout(180)


def test_output_and_artifacts_come_back_byte_for_byte(stack: Stack) -> None:
    run = played(
        stack.tenant,
        r"printf 'a\000\377b'; printf err >&2",
        "head -c 3000000 /dev/zero | tr '\\0' x; mkdir out; head -c 700000 /dev/urandom > 'out/a b%41.bin'",
        artifacts=["out/*"],
    )
    assert run["outcome"] == "passed", run
    base = f"/v1/runs/{run['id']}"

    assert stack.tenant.get(f"{base}/steps/1/stdout").content == b"a\0\xffb"
    assert stack.tenant.get(f"{base}/steps/1/stderr").content == b"err"
    assert stack.tenant.get(f"{base}/steps/2/stderr").content == b""
    assert stack.tenant.get(f"{base}/steps/2/stdout").content == b"x" * 2**20
    (artifact,) = run["artifacts"]
    assert artifact["path"] == "out/a b%2541.bin"
    answer = stack.tenant.get(f"{base}/artifacts/out/a%20b%252541.bin")
    assert (len(answer.content), hashlib.sha256(answer.content).hexdigest()) == (artifact["bytes"], artifact["sha256"])
    theirs = stack.stranger.get(f"{base}/steps/1/stdout")
    assert (theirs.status_code, theirs.json()["code"]) == (404, "not_found")


def test_a_deleted_runs_bytes_are_gone(stack: Stack) -> None:
    run = played(stack.tenant, f"echo {time.time_ns()}")
    base = f"/v1/runs/{run['id']}"
    assert stack.tenant.get(f"{base}/steps/1/stdout").status_code == 200

    assert stack.tenant.delete(base).status_code == 204
    assert stack.tenant.get(f"{base}/steps/1/stdout").status_code == 404


ODD = [
    b"%", b"%25", b"%FF", b"\xff", b"\xc3", b"\xa9", "é".encode(), "\u202e".encode(), b"\n", b"\x1b[2J", b"a", b" ",
    b"\\", b"'", b"?", b"#", b"..", b"\xed\xa0\x80", b"-", b"\x7f",
]  # fmt: skip


def odd_names() -> list[bytes]:
    """As a guest would choose them, to be mistaken for one another or for something else."""
    dice = random.Random(17)
    made = {b"".join(dice.choices(ODD, k=dice.randrange(1, 5))) for _ in range(150)}
    return sorted(made - {b".", b".."} | {b"%FF", b"\xff", b"%25FF", b"%", b"%2", b"caf\xe9", "café".encode()})


def test_a_file_of_any_name_comes_back_under_the_one_spelling_of_it(stack: Stack) -> None:
    names = odd_names()
    make = (
        "import json, os, sys\nos.mkdir('out')\nos.symlink('/', b'out/link\\xff')\n"
        "for name in map(bytes.fromhex, json.load(sys.stdin)): open(b'out/' + name, 'wb').write(name)\n"
    )
    step = {"run": python(make), "stdin": json.dumps([name.hex() for name in names])}
    run = played(stack.tenant, step, artifacts=["out/*"], limits={"files": 1000})
    assert run["outcome"] == "passed", run
    paths = [artifact["path"] for artifact in run["artifacts"]]
    assert sorted(read_back(path) for path in paths) == [b"out/" + name for name in names]
    assert len(set(paths)) == len(names) > 100
    assert run["skipped_artifacts"] == [{"path": "out/link%FF", "why": "symlink"}]
    for path in paths:
        assert path.isprintable()
        answer = stack.tenant.get(f"/v1/runs/{run['id']}/artifacts/{quote(path, safe='/')}")
        assert (answer.status_code, b"out/" + answer.content) == (200, read_back(path)), path
