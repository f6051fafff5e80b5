"""A real sandbox from upload to collection, and what the `default` runtime offers to ordinary programs."""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.core.boundary import Bundle, Ended
from service.core.errors import BoundaryError, ProvisionFailed
from tests.sandboxes import (
    MIB,
    Never,
    Sink,
    artifact_limits,
    gvisor_boundary,
    make_ref,
    make_spec,
    make_step,
    require_gvisor,
    shell,
)
from workers.boundaries.gvisor.driver import GvisorBoundary
from workers.runtimes.import_rootfs import import_directory
from workers.runtimes.store import RuntimeStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture
def boundary(tmp_path: Path, store: Path) -> Iterator[GvisorBoundary]:
    require_gvisor()
    with gvisor_boundary(tmp_path / "run", store=store) as made:
        yield made


def bundle(path: Path, files: dict[str, str]) -> Bundle:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            info.mode = 0o755 if text.startswith("#!") else 0o644
            archive.addfile(info, io.BytesIO(text.encode()))
    size = sum(len(text.encode()) for text in files.values())
    return Bundle(
        digest="sha256:" + "0" * 64, bytes_=path.stat().st_size, files=len(files), content_bytes=size, path=path
    )


def test_an_uploaded_program_is_the_guests_own_and_its_report_comes_back(
    boundary: GvisorBoundary, tmp_path: Path
) -> None:
    program = "import json, os\nos.makedirs('out')\njson.dump({'uid': os.getuid()}, open('out/report.json', 'w'))\n"
    code = bundle(tmp_path / "b.tar.gz", {"src/main.py": program, "run.sh": "#!/bin/sh\nexec python3 src/main.py\n"})
    ref, sink = make_ref(installation=boundary.host.installation), Sink()
    with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
        sandbox.upload(code)
        with pytest.raises(BoundaryError):
            sandbox.upload(code)
        played = sandbox.execute(make_step("./run.sh"))
        changed = sandbox.execute(shell("echo '# mine' >> src/main.py && rm run.sh"))
        found = sandbox.collect(["out/**"], limits=artifact_limits(), sink=sink)
    boundary.destroy(ref)
    assert (played.exit_code, changed.exit_code) == (0, 0), played.stderr.data
    assert sink.stored[found.kept[0].sha256] == b'{"uid": 65532}'
    assert found.usage.cpu_s > 0
    assert found.usage.peak_memory_bytes > MIB


def test_a_bundle_that_does_not_fit_is_a_provisioning_failure(boundary: GvisorBoundary, tmp_path: Path) -> None:
    code = bundle(tmp_path / "b.tar.gz", {"big": "x" * 2 * MIB})
    ref = make_ref(installation=boundary.host.installation)
    with boundary.open(make_spec(disk=MIB), ref, cancelled=Never()) as sandbox, pytest.raises(ProvisionFailed):
        sandbox.upload(code)
    boundary.destroy(ref)


@pytest.mark.parametrize(
    ("tool", "command"),
    [
        ("python3", "python3 -c 'import json, hashlib; print(json.dumps(42))'"),
        ("awk", "echo 41 | awk '{print $1 + 1}'"),
        ("perl", "perl -e 'print 42'"),
        ("bash", "bash -c 'echo $((6 * 7))'"),
        ("tar", "mkdir d && echo 42 > d/f && tar czf d.tgz d && tar xzOf d.tgz d/f"),
        ("cc", "echo 'int printf(const char *, ...); int main(void) { printf(\"42\"); }' > m.c && cc m.c -o m && ./m"),
    ],
)
def test_the_default_runtime_runs_what_the_host_has(boundary: GvisorBoundary, tool: str, command: str) -> None:
    if shutil.which(tool, path="/usr/bin:/bin") is None:
        pytest.skip(f"this host has no {tool}")
    ref = make_ref(installation=boundary.host.installation)
    with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
        played = sandbox.execute(shell(command))
    boundary.destroy(ref)
    assert played.stdout.data.strip() == b"42", played.stderr.data


def test_an_imported_root_is_all_that_a_guest_sees(boundary: GvisorBoundary, tmp_path: Path, store: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    program = tmp_path / "m.c"
    program.write_text('#include <stdio.h>\nint main(void) { puts(fopen("/usr/bin/env", "r") ? "host" : "own"); }\n')
    subprocess.run(["cc", "-static", "-o", source / "hello", program], check=True)
    import_directory(RuntimeStore(store), "tiny", source)
    ref = make_ref(installation=boundary.host.installation)
    spec = make_spec().model_copy(update={"runtime": "tiny"})
    with boundary.open(spec, ref, cancelled=Never()) as sandbox:
        played = sandbox.execute(make_step("/hello"))
        no_shell = sandbox.execute(shell("true"))
        late = sandbox.execute(make_step("/hello", timeout_s=0.001))
        after = sandbox.execute(make_step("/hello"))
    boundary.destroy(ref)
    assert played.stdout.data == b"own\n"
    assert no_shell.ended is Ended.NOT_STARTED
    assert late.ended in (Ended.STEP_TIMEOUT, Ended.EXITED)
    assert after.stdout.data == b"own\n", "a time-out needs no program of the guest's root"
    (row,) = boundary.probe()
    assert {"default", "tiny"} <= set(row.runtimes)


def test_a_runtime_that_is_not_offered_is_refused(boundary: GvisorBoundary) -> None:
    ref = make_ref(installation=boundary.host.installation)
    spec = make_spec().model_copy(update={"runtime": "absent"})
    with pytest.raises(ProvisionFailed, match="absent"), boundary.open(spec, ref, cancelled=Never()):
        pass
    assert list(boundary.discover()) == []


def test_what_runsc_says_when_it_fails_is_the_reason_and_nothing_is_left(
    boundary: GvisorBoundary, tmp_path: Path, store: Path
) -> None:
    broken = tmp_path / "runsc"
    broken.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    with gvisor_boundary(tmp_path / "broken", store=store, runsc=broken) as other:
        ref = make_ref(installation=other.host.installation)
        with pytest.raises(ProvisionFailed, match="no such luck"), other.open(make_spec(), ref, cancelled=Never()):
            pass
        assert list(other.discover()) == []
        (row,) = other.probe()
        assert not row.available
        assert row.missing


def test_a_missing_controller_is_a_refusal_not_a_weaker_wall(boundary: GvisorBoundary) -> None:
    boundary.cgroups.missing = ("the cgroup controller pids (mount it)",)
    ref = make_ref(installation=boundary.host.installation)
    with pytest.raises(ProvisionFailed, match="pids"), boundary.open(make_spec(), ref, cancelled=Never()):
        pass
    (row,) = boundary.probe()
    assert (row.available, row.missing) == (False, ("the cgroup controller pids (mount it)",))


def test_twenty_runs_leave_no_descriptor_open(boundary: GvisorBoundary) -> None:
    def one() -> None:
        ref = make_ref(installation=boundary.host.installation)
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            sandbox.execute(shell("cat; (sleep 60 &)", stdin=b"x"))
            sandbox.execute(shell("sleep 5", timeout_s=0.05))
            sandbox.collect(["**"], limits=artifact_limits(), sink=Sink())
        boundary.destroy(ref)

    one()
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        one()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_the_steps_uid_is_evidence_even_when_no_step_lived_long_enough_to_be_seen(boundary: GvisorBoundary) -> None:
    ref = make_ref(installation=boundary.host.installation)
    with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
        assert sandbox.evidence().uid == 65532
    boundary.destroy(ref)
