"""What a real sandbox printed and left, fetched over HTTP."""

import hashlib
import time

import pytest

from tests.stack import Stack, played

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
    assert artifact["path"] == "out/a b%41.bin"
    answer = stack.tenant.get(f"{base}/artifacts/out/a%20b%2541.bin")
    assert (len(answer.content), hashlib.sha256(answer.content).hexdigest()) == (artifact["bytes"], artifact["sha256"])
    theirs = stack.stranger.get(f"{base}/steps/1/stdout")
    assert (theirs.status_code, theirs.json()["code"]) == (404, "not_found")


def test_a_deleted_runs_bytes_are_gone(stack: Stack) -> None:
    run = played(stack.tenant, f"echo {time.time_ns()}")
    base = f"/v1/runs/{run['id']}"
    assert stack.tenant.get(f"{base}/steps/1/stdout").status_code == 200

    assert stack.tenant.delete(base).status_code == 204
    assert stack.tenant.get(f"{base}/steps/1/stdout").status_code == 404
