"""What makes pods in a cluster needs nothing of its own machine: it plays a run without one capability."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.namespaces import NamespaceKind, Site
from tests.contained import argv_of
from tests.deployment import ROOT, compose
from tests.sandboxes import Never, Sink, artifact_limits, make_spec, shell
from workers.boundaries.namespace.driver import NamespaceBoundary, NamespaceHost


@pytest.mark.parametrize("variant", ["gvisor"])
def test_a_run_is_played_with_what_compose_gives_for_a_cluster(site: Site, variant: str) -> None:
    service = compose()["services"]["worker-cluster"]
    host = site.host(variant)
    arguments = [host.installation, str(host.kubeconfig), host.image, variant]
    program = [sys.executable, "-m", "tests.cluster.test_no_privileges", *arguments]
    done = subprocess.run(
        argv_of(program, capabilities=service.get("cap_add", []), profile=None),
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == {"capabilities": "0000000000000000", "exit": 0, "artifacts": ["hello\n"], "left": 0}


def _play() -> None:
    installation, kubeconfig, image, variant = sys.argv[1:]
    boundary = NamespaceBoundary(
        NamespaceHost(
            installation=installation, site="here", kubeconfig=Path(kubeconfig), image=image, variants=(variant,)
        )
    )
    ref, sink = NamespaceKind(boundary, variant).ref(), Sink()
    try:
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            played = sandbox.execute(shell("mkdir out && echo hello > out/said"))
            sandbox.collect(["out/**"], limits=artifact_limits(), sink=sink)
        boundary.destroy(ref)
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        said = {
            "capabilities": status["CapBnd"],
            "exit": played.exit_code,
            "artifacts": [data.decode() for data in sink.stored.values()],
            "left": len(list(boundary.discover())),
        }
        print(json.dumps(said))
    finally:
        boundary.close()


if __name__ == "__main__":
    _play()
