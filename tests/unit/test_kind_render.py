"""What kind is told of a cluster, as a whole document: read golden/kind_*.json in review."""

import json
import tomllib
from datetime import UTC, datetime

import pytest
import yaml

from service.core.boundary import BoundaryKind, BoundaryRef, tenant_hash
from tests.unit.test_gvisor_render import assert_golden
from workers.boundaries.cluster.kind_render import (
    LABELS,
    NODE_IMAGE,
    NODE_IMAGE_WITH,
    PREFIX,
    RUNSC,
    STANDBY,
    Node,
    labels,
    network_name,
    read_labels,
    read_network_name,
    reason_of,
    render_config,
    render_limits,
    render_network_options,
    render_wall,
    step_of,
    unlabelled,
)
from workers.kube import templates
from workers.kube.manifests import FOLDER

HOST_BYTES = 24 * 2**30
HOSTILE = "acme\n  extraMounts: {{pod_pids}} dev.blastdoor.run=x " + "a" * 80


def ref_of(*, tenant: str = "acme", fence: int = 2) -> BoundaryRef:
    return BoundaryRef(
        installation="inst0", kind=BoundaryKind.CLUSTER, variant="kind", site="here", tenant=tenant,
        run_id="run_" + "0" * 31 + "1", fence=fence, expires_at=datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=UTC),
    )  # fmt: skip


def documents(text: str) -> dict[str, object]:
    """With the patches read, so that a reviewer sees them as documents."""
    cluster = yaml.safe_load(text)
    cluster["kubeadmConfigPatches"] = [yaml.safe_load(patch) for patch in cluster["kubeadmConfigPatches"]]
    cluster["containerdConfigPatches"] = [tomllib.loads(patch) for patch in cluster["containerdConfigPatches"]]
    return dict(cluster)


def rendered(*, cgroup_v1: bool = False) -> str:
    return render_config(Node(), host_memory_bytes=HOST_BYTES, cgroup_v1=cgroup_v1)


def test_all_that_kind_and_the_engine_are_told() -> None:
    assert_golden("kind_config.json", documents(rendered()))
    network = {"name": network_name(ref_of().name, "inst0"), "labels": labels(ref_of())}
    told = {"options": render_network_options(), "limits": render_limits(Node(cpus=1.5)), "executed": render_wall()}
    assert_golden("kind_engine.json", network | {name: list(words) for name, words in told.items()})


def test_a_host_with_the_first_control_groups_is_the_only_difference_between_hosts() -> None:
    first, second = documents(rendered(cgroup_v1=True)), documents(rendered())
    kubelet = first["kubeadmConfigPatches"][-1]  # type: ignore[index]
    assert kubelet.pop("failCgroupV1") is False
    assert first == second


def test_nothing_of_the_host_is_mounted_and_nothing_is_open_beyond_loopback() -> None:
    cluster = documents(rendered())
    assert cluster["nodes"] == [{"role": "control-plane"}], "no extraMounts, no extraPortMappings"
    assert cluster["networking"]["apiServerAddress"] == "127.0.0.1"  # type: ignore[index]


def test_patches_are_of_no_version_that_kind_could_pass_over_without_a_word() -> None:
    cluster = documents(rendered())
    assert [patch.get("apiVersion") for patch in cluster["kubeadmConfigPatches"]] == [None] * 3  # type: ignore[attr-defined]
    by_version = {patch.pop("version"): patch for patch in cluster["containerdConfigPatches"]}  # type: ignore[attr-defined]
    assert by_version.keys() == {2, 3}
    old, new = (str(by_version[version]) for version in (2, 3))
    assert old.replace("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime") == new
    (gvisor,) = (one for one in templates("runtimeclass") if one["metadata"]["name"] == "gvisor")
    assert f"'{gvisor['handler']}': {{'runtime_type'" in new


def test_what_the_configuration_names_in_a_node_is_in_the_node_image() -> None:
    folder = FOLDER / "kind" / "node-image"
    recipe = (folder / "Dockerfile").read_text()
    arguments = documents(rendered())["kubeadmConfigPatches"][0]["apiServer"]["extraArgs"]  # type: ignore[index]
    named = [one["value"] for one in arguments if one["value"].startswith("/etc/kubernetes/blastdoor/")]
    assert len(named) == 3
    for path in named:
        name = path.rpartition("/")[2]
        assert yaml.safe_load((folder / name).read_text())["kind"]
        assert name in recipe
    assert f'LABEL {NODE_IMAGE}="{NODE_IMAGE_WITH}" {RUNSC}="${{RUNSC}}"' in recipe


def test_what_the_node_may_not_have_of_the_host_is_set_aside_for_nobody() -> None:
    kubelet = documents(rendered())["kubeadmConfigPatches"][-1]  # type: ignore[index]
    aside = int(kubelet["systemReserved"]["memory"])
    assert 0 < HOST_BYTES - aside < Node().memory_bytes, "pods get less than the node, whose own programs are in none"
    with pytest.raises(ValueError, match="on a host of"):
        render_config(Node(memory_bytes=HOST_BYTES + 1), host_memory_bytes=HOST_BYTES, cgroup_v1=False)


def test_labels_carry_the_whole_reference_and_of_the_tenant_a_hash() -> None:
    ref = ref_of(tenant=HOSTILE)
    made = labels(ref)
    assert made.keys() == {*LABELS, PREFIX + "managed"}
    assert "acme" not in json.dumps(made)
    known = {"tenant": tenant_hash("inst0", HOSTILE), "expires_at": datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC)}
    assert read_labels(made) == ref.model_copy(update=known)
    created = ref.model_copy(update={"created_at": datetime(2026, 1, 2, tzinfo=UTC)})
    assert (read_labels(labels(created)) or ref).created_at == created.created_at
    assert (read_labels(labels(ref_of(tenant=STANDBY, fence=0))) or ref).tenant == STANDBY


@pytest.mark.parametrize(
    "changed",
    [
        {"run": "run_x"},
        {"variant": "capi"},
        {"kind": "cloud"},
        {"fence": "-"},
        {"expires-at": "9" * 30},
        {"site": None},
    ],
)
def test_what_is_no_reference_of_ours_is_none(changed: dict[str, str | None]) -> None:
    found = labels(ref_of()) | {PREFIX + key: value for key, value in changed.items()}
    assert read_labels({key: value for key, value in found.items() if value is not None}) is None


def test_the_name_of_a_network_says_whose_a_container_is() -> None:
    assert read_network_name(network_name(ref_of().name, "inst_0-a")) == (ref_of().name, "inst_0-a")
    for other in ("kind", "bridge", ref_of().name, f"{ref_of().name}.", f"x{ref_of().name}.inst0", ""):
        assert read_network_name(other) is None


def test_what_lost_its_labels_is_known_by_its_name_and_long_expired() -> None:
    ref = ref_of()
    lost = unlabelled(ref.name, installation="inst0", site="here")
    assert (lost.name, lost.run_id, lost.fence, lost.tenant) == (ref.name, ref.run_id, 2, "")
    assert lost.expires_at < datetime(2000, 1, 1, tzinfo=UTC)
    with pytest.raises(ValueError, match="no boundary's name"):
        unlabelled("kind", installation="inst0", site="here")


# What kind 0.33.0 writes to stderr where it is no terminal.
SAID = """\
Creating cluster "bd-1" ...
 • Ensuring node image (sha256:0123) 🖼  ...
 ✓ Ensuring node image (sha256:0123) 🖼
 • Preparing nodes 📦   ...
WARNING: Overriding docker network due to KIND_EXPERIMENTAL_DOCKER_NETWORK
 ✓ Preparing nodes 📦
 • Writing configuration 📜  ...
 • Starting control-plane 🕹️  ...
 ✗ Starting control-plane 🕹️
Deleted nodes: ["bd-1-control-plane"]
ERROR: failed to create cluster: failed to init node with kubeadm: command "docker exec -i x" failed: exit status 1
Command Output: I1123 20:00:00.000000     119 initconfiguration.go:261] loading configuration
error: error execution phase wait-control-plane: the API server is not healthy
To see the stack trace of this error execute with --v=5 or higher

Stack Trace:
sigs.k8s.io/kind/pkg/errors.WithStack
"""


def test_what_kind_is_about_to_do_is_said_in_plain_words() -> None:
    steps = [step for line in SAID.splitlines() if (step := step_of(line)) is not None]
    assert steps == ["ensuring node image", "preparing nodes", "writing configuration", "starting control-plane"]


REFUSED = """\
Creating cluster "bd-1" ...
ERROR: failed to create cluster: command "docker run --name bd-1-control-plane -e A=b sha256:0123" failed with error: exit status 127

Command Output: abfb5e1b5503
docker: Error response from daemon: unable to start container process: no such file or directory

Run 'docker run --help' for more information
"""  # noqa: E501


def test_why_kind_failed_is_what_it_tried_and_what_was_complained_of() -> None:
    assert reason_of(REFUSED) == (
        "failed to create cluster: `docker run` failed with error: exit status 127: docker: Error response from "
        "daemon: unable to start container process: no such file or directory"
    )
    assert reason_of(SAID) == (
        "failed to create cluster: failed to init node with kubeadm: `docker exec` failed: exit status 1: "
        "error: error execution phase wait-control-plane: the API server is not healthy"
    )
    assert reason_of("something\nelse\n\n") == "else"
    assert reason_of("") == "it did not say why"
    assert len(reason_of("ERROR: " + "x" * 9999 + "\nerror: " + "y" * 9999)) == 602
