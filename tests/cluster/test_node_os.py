"""What cluster_templates/node-os says of nodes, where a kubelet can be asked."""

import subprocess

from tests.cluster.lab import parts

PREFIX = "blastdoor.node-restriction.kubernetes.io"


def refusal(kubelet: str, label: str) -> str:
    """What it says and ends with; that its configuration is not there ends it in any case."""
    argv = [kubelet, f"--node-labels={label}", "--config=/nonexistent/kubelet.yaml"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    return done.stderr


def test_a_kubelet_that_is_told_to_label_its_own_node_as_ours_does_not_start(built: parts.Parts) -> None:
    kubelet = str(built.program("kubelet"))
    for label in (f"{PREFIX}/pool=untrusted", f"{PREFIX}/group=acme"):
        assert f"labels specified with --node-labels: [{label.partition('=')[0]}]" in refusal(kubelet, label)

    assert "--node-labels: [" not in refusal(kubelet, "example.org/pool=untrusted"), "the control: others it may"
