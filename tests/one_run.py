"""`python -m tests.one_run INSTALLATION DIRECTORY` plays one gVisor run from upload to destruction, straight at the
driver. Exit 0: all of it was possible."""

import io
import os
import sys
import tarfile
from pathlib import Path

from service.core.boundary import Bundle
from tests.sandboxes import Never, Sink, artifact_limits, make_ref, make_spec, make_step
from workers.boundaries.gvisor.driver import GvisorBoundary, GvisorHost
from workers.runtimes.store import RuntimeStore

PROGRAM = b"#!/bin/sh\nmkdir out && id -u > out/uid\n"


def driver(installation: str, directory: Path) -> GvisorBoundary:
    store = RuntimeStore(directory / "runtimes")
    return GvisorBoundary(
        GvisorHost(installation=installation, site="here", runtime_dir=directory / "run", runtimes=store)
    )


def play(boundary: GvisorBoundary, bundle: Path) -> None:
    with tarfile.open(bundle, "w:gz") as archive:
        member = tarfile.TarInfo("run.sh")
        member.size, member.mode = len(PROGRAM), 0o755
        archive.addfile(member, io.BytesIO(PROGRAM))
    code = Bundle(
        digest="sha256:" + "0" * 64, bytes_=bundle.stat().st_size, files=1, content_bytes=len(PROGRAM), path=bundle
    )
    ref, sink = make_ref(installation=boundary.host.installation), Sink()
    with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
        sandbox.upload(code)
        played = sandbox.execute(make_step("./run.sh"))
        sandbox.collect(["out/**"], limits=artifact_limits(), sink=sink)
    boundary.destroy(ref)
    assert played.exit_code == 0, played.stderr.data
    assert list(sink.stored.values()) == [b"65532\n"]
    assert list(boundary.discover()) == []


if __name__ == "__main__":
    made = driver(sys.argv[1], Path(sys.argv[2]))
    play(made, Path(sys.argv[2]) / f"bundle-{os.getpid()}.tar.gz")
    made.close()
