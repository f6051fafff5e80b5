"""What guests wrote, over HTTP and on both databases: bytes as they were, headers that let no browser act on them, and
the same 404 for all that is not the caller's. Then the storage quota and what a purge leaves to be asked for."""

import base64
import hashlib
import io
import os
import time
import zipfile
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from service.core.boundary import Artifact
from service.core.ids import new_run_id
from service.usecases.retention import FRESH, purge
from tests.factories import make_result, make_step_result
from tests.integration.api.conftest import DATABASES, SCENARIO, Served

pytestmark = pytest.mark.parametrize("settings", DATABASES, indirect=True)
WEIRD = [
    "a b.txt", "Ümläut/é.json", "per%cent", "what?.txt", "hash#.txt", "semi;colon&x=y", 'quo"te', "back\\slash",
    "+plus", "new\nline\n", "..dots", "-rf", "cr\r\nX-Evil: 1", "%2e%2e", "snow\u2603", "steps/1/stdout", "tab\t",
]  # fmt: skip


def left(served: Served, who: str, *, files: dict[str, bytes], outputs: dict[str, bytes]) -> str:
    """A finished run that printed and left these. -> its id."""
    blobs = served.app.state.context.deps.blobs
    run_id = str(served.submit(who)["id"])
    claim = served.claim()
    served.store.mark_running(claim.run.id, claim.fence)
    served.store.mark_collecting(claim.run.id, claim.fence)
    artifacts = tuple(
        Artifact(path=path, bytes=len(data), sha256=blobs.put_bytes(who, data).removeprefix("sha256:"))
        for path, data in files.items()
    )
    result = make_result(
        steps=(make_step_result(text="x"),),
        artifacts=artifacts,
        outputs={name: blobs.put_bytes(who, data) for name, data in outputs.items()},
        output_bytes={name: len(data) for name, data in outputs.items()},
    )
    served.store.finish(claim.run.id, claim.fence, result)
    served.store.record_destroyed(claim.run.id, claim.fence)
    return run_id


def artifact_url(run_id: str, path: str) -> str:
    return f"/v1/runs/{run_id}/artifacts/{quote(path, safe='/')}"


def digest_header(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def insist_on_harmless(answer: httpx.Response, data: bytes) -> None:
    headers = answer.headers
    assert (answer.status_code, answer.content == data) == (200, True), answer.text[:500]
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-length"] == str(len(data))
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert headers["cache-control"] == "no-store"
    assert headers["repr-digest"] == digest_header(data)
    assert headers.get_list("content-disposition") == [headers["content-disposition"]]
    kind, _, name = headers["content-disposition"].partition("; filename=")
    assert kind == "attachment"
    assert all(c.isascii() and (c.isalnum() or c in "._-") for c in name.strip('"')), name
    assert name.strip('"')[0].isalnum() or name.strip('"')[0] == "_"
    assert "x-evil" not in headers


def test_outputs_are_the_bytes_that_were_kept(served: Served) -> None:
    page = b"<script>alert(1)</script>\xff\x00"
    run_id = left(served, "acme", files={}, outputs={"1.stdout": page})
    acme = served.client("acme")

    answer = acme.get(f"/v1/runs/{run_id}/steps/1/stdout")
    insist_on_harmless(answer, page)
    assert answer.headers["content-disposition"] == f'attachment; filename="{run_id}-1.stdout"'
    insist_on_harmless(acme.get(f"/v1/runs/{run_id}/steps/1/stderr"), b"")
    run = acme.get(f"/v1/runs/{run_id}").json()
    assert "outputs" not in run
    assert "output_bytes" not in run


def test_artifacts_are_found_by_any_name_that_a_guest_may_choose(served: Served) -> None:
    files = {path: path.encode() for path in WEIRD}
    run_id = left(served, "acme", files=files, outputs={})
    listed = served.client("acme").get(f"/v1/runs/{run_id}").json()["artifacts"]

    assert [artifact["path"] for artifact in listed] == WEIRD
    for artifact in listed:
        answer = served.client("acme").get(artifact_url(run_id, artifact["path"]))
        insist_on_harmless(answer, files[artifact["path"]])
        assert hashlib.sha256(answer.content).hexdigest() == artifact["sha256"]


def test_a_large_artifact_is_streamed_and_not_held(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    large = os.urandom(2**20) * 24
    run_id = left(served, "acme", files={"large.bin": large}, outputs={})
    pieces: list[int] = []
    store = served.app.state.context.store

    async def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        found = await store(function, *args, **kwargs)
        if isinstance(found, bytes):
            pieces.append(len(found))
        return found

    monkeypatch.setattr(served.app.state.context, "store", watched)

    insist_on_harmless(served.client("acme").get(artifact_url(run_id, "large.bin")), large)
    assert max(pieces) <= 256 * 1024
    assert sum(pieces) == len(large)


def test_a_reader_who_hangs_up_leaves_no_file_open(served: Served) -> None:
    large = os.urandom(2**20) * 24
    run_id = left(served, "acme", files={"large.bin": large}, outputs={})
    before = _open_blobs(served)
    with served.client("acme").stream("GET", artifact_url(run_id, "large.bin")) as answer:
        next(answer.iter_raw(1))
    served.client("acme").get("/healthz")

    assert _settles(lambda: _open_blobs(served) == before)


def _open_blobs(served: Served) -> int:
    names = []
    for name in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return sum("/blobs/" in name for name in names)


def _settles(true: Any) -> bool:
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(true())


def test_what_is_anothers_is_the_same_404_as_what_never_was(served: Served) -> None:
    theirs, never = left(served, "acme", files={"a": b"1"}, outputs={"1.stdout": b"2"}), new_run_id()
    globex = served.client("globex")
    for suffix in ("/steps/1/stdout", "/steps/1/stderr", "/artifacts/a", "/artifacts/b", "/steps/2/stdout"):
        both = [globex.get(f"/v1/runs/{run_id}{suffix}") for run_id in (theirs, never)]
        assert [answer.status_code for answer in both] == [404, 404]
        told = [
            answer.content.replace(run_id.encode(), b"RUN").replace(answer.headers["x-request-id"].encode(), b"ID")
            for answer, run_id in zip(both, (theirs, never), strict=True)
        ]
        assert told[0] == told[1]
        assert "content-disposition" not in both[0].headers


def test_what_the_run_does_not_have_is_404(served: Served) -> None:
    run_id = left(served, "acme", files={"a": b"1"}, outputs={})
    for suffix in (
        "/steps/2/stdout", "/steps/0/stdout", "/steps/-1/stdout", "/steps/01/stdout", "/steps/x/stdout",
        "/steps/99999999999/stdout", "/steps/%D9%A1/stdout", "/steps/1/stdin", "/artifacts/b", "/artifacts/",
        "/artifacts//a", "/artifacts/a/", "/artifacts/..%2Fa", "/artifacts/%00", "/artifacts/A",
    ):  # fmt: skip
        answer = served.client("acme").get(f"/v1/runs/{run_id}{suffix}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), suffix


def test_deleting_a_run_takes_its_output_and_artifacts(served: Served) -> None:
    run_id = left(served, "acme", files={"a": b"one"}, outputs={"1.stdout": b"two"})
    blobs = served.app.state.context.deps.blobs
    kept = served.store.get_kept(run_id, "acme")
    digests = [*kept.outputs.values(), f"sha256:{kept.run.artifacts[0].sha256}"]
    assert all(blobs.path("acme", digest).exists() for digest in digests)

    assert served.client("acme").delete(f"/v1/runs/{run_id}").status_code == 204

    for digest in digests:
        with pytest.raises(Exception, match="no such thing"):
            blobs.path("acme", digest)


def test_a_purged_run_is_still_read_and_its_files_say_what_became_of_them(served: Served) -> None:
    run_id = left(served, "acme", files={"a": b"one"}, outputs={"1.stdout": b"two"})
    before = served.client("acme").get(f"/v1/runs/{run_id}").json()
    blobs = served.app.state.context.deps.blobs

    purged = purge(
        served.store, blobs, blobs_older_than=timedelta(0), clock=lambda: time.time() + FRESH.total_seconds() + 1
    )

    assert (purged.runs, purged.runs_without_blobs, purged.blobs) == (0, 1, 2)
    assert served.client("acme").get(f"/v1/runs/{run_id}").json() == before
    for suffix in ("/steps/1/stdout", "/artifacts/a"):
        answer = served.client("acme").get(f"/v1/runs/{run_id}{suffix}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert "purged" in answer.json()["detail"]


def test_a_bundle_beyond_the_storage_quota_is_429_in_numbers_and_leaves_nothing(served: Served) -> None:
    left(served, "acme", files={"a": b"x" * 5000}, outputs={})
    served.client("operator").patch("/v1/admin/tenants/acme", json={"quota": {"storage_bytes": 5100}})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("scenario.yaml", SCENARIO)
    bundle = out.getvalue()
    blobs = served.app.state.context.deps.blobs

    answer = served.client("acme").post("/v1/runs", files={"bundle": bundle})

    assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
    assert "5000" in answer.json()["detail"]
    assert "5100" in answer.json()["detail"]
    with pytest.raises(Exception, match="no such thing"):
        blobs.path("acme", f"sha256:{hashlib.sha256(bundle).hexdigest()}")
    assert served.client("globex").post("/v1/runs", files={"bundle": bundle}).status_code == 202
    served.submit("acme")
