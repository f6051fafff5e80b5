"""A run that has a cluster of its own, in a pod with gVisor: what it reaches, what it is, and a customer's operator
that does its work in there."""

import base64
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.core.boundary import BoundaryKind, BoundarySpec, Bundle, Execution, StepSpec
from service.core.controls import Limits, Need, Network
from service.core.verdict import judge_step
from service.intake.documents import parse_controls, parse_scenario
from tests.cluster.ears import METADATA, NEIGHBOUR, Ears, listening
from tests.cluster.kubectl_program import kubectl
from tests.cluster.lab.components import ADDRESS, Place
from tests.cluster.lab.outside import Lab
from tests.cluster.lab.parts import NoParts, Parts
from tests.cluster.own_api_ground import CRDS, Own, definition, make, own, own_api_policies, ready, refusal
from tests.cluster.pods import eventually
from tests.cluster.runtime_image import write_runtime
from tests.sandboxes import MIB, Never, make_ref, shell
from workers.boundaries.cluster.inside import ClusterSandbox, Inside
from workers.kube import Manifest
from workers.pods.own_api import FOLDER, KUBECONFIG, NAMESPACE
from workers.pods.own_api_checks import own_api_fault
from workers.pods.render import namespace_name

__all__ = ["own", "ready"]
pytestmark = pytest.mark.timeout(600)
EXAMPLE = Path(__file__).parents[2] / "examples/operator"
KUBELET = 10250
REACH = 'for at in %s; do nc -w 3 ${at%%:*} ${at##*:} < /dev/null > /dev/null 2>&1 && echo "REACHED $at"; done; true'
SPEC = BoundarySpec(
    limits=Limits(cpu=1, memory=512 * MIB, disk=64 * MIB, pids=256, wall="600s"),
    network=Network(),
    needs=(Need.KUBERNETES_API,),
)


@pytest.fixture(scope="module")
def image(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A runtime as an operator would offer it for this: a shell, its tools, and kubectl."""
    try:
        program = kubectl()
    except NoParts as why:
        pytest.skip(str(why))
    busybox = Path(Parts.read(Place(lab.state).config / "parts.json").program("busybox"))
    archive = tmp_path_factory.mktemp("image") / "runtime.tar"
    image = write_runtime(archive, busybox, APPLETS, more={"usr/bin/kubectl": program})
    lab.load(archive)
    return image


APPLETS = ["sh", "nc", "cat", "sed", "test", "touch", "sleep", "ls", "env", "true", "id", "dmesg", "stat"]


LATE = "late.example.net"
"""A group that the cluster got after its policies were written, and before its run was opened."""


@dataclass(frozen=True)
class Run:
    """`name`: of its pod; `namespace`: in which it stands."""

    own: Own
    sandbox: ClusterSandbox
    inside: Inside
    name: str
    namespace: str

    def sh(self, command: str, *, timeout_s: float = 90) -> Execution:
        return self.sandbox.execute(shell(command, timeout_s=timeout_s))

    def said(self, command: str) -> str:
        """What it prints, on both streams, whether it ends well or not."""
        done = self.sh(f"{{ {command} ; }} 2>&1")
        assert done.ended == "exited", done
        return done.stdout.data.decode()


@pytest.fixture(scope="module")
def run(own: Own, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The pod of a run, opened the way that the boundary does it, with the example in it."""
    ref = make_ref(installation="fedcba9876543210fedcba9876543210", seconds=1100)
    ref = ref.model_copy(update={"kind": BoundaryKind.CLUSTER, "variant": "kind"})
    name = namespace_name(ref.model_copy(update={"kind": BoundaryKind.NAMESPACE, "variant": "gvisor"}))
    with ExitStack() as stack:
        inside = Inside.of_ready(own.ready.kubeconfig, {"default": image})
        stack.callback(inside.close)
        stack.callback(own.admin.delete, "Namespace", f"bd-listener-{ref.installation}")
        stack.callback(inside.engine.delete, "Namespace", name)
        late = definition(LATE, plural="plans")
        own.admin.raw("POST", CRDS, body=late)
        stack.callback(own.admin.raw, "DELETE", f"{CRDS}/{late['metadata']['name']}")
        sandbox = inside.open(SPEC, ref, image=image, cancelled=Never(), tell=lambda line: None)
        sandbox.upload(_packed(tmp_path_factory.mktemp("bundle") / "bundle", sorted(EXAMPLE.iterdir())))
        yield Run(own, sandbox, inside, ref.name, name)


def test_kubectl_works_with_what_the_pod_has(run: Run) -> None:
    assert run.said("kubectl auth whoami --output=jsonpath={.status.userInfo.username}") == (
        f"system:serviceaccount:{run.namespace}:sandbox"
    )
    assert run.said("kubectl get pods") == f"No resources found in {NAMESPACE} namespace.\n"
    assert run.said("kubectl create configmap one --from-literal=a=b && kubectl delete configmap one").splitlines() == [
        "configmap/one created", 'configmap "one" deleted from scenario namespace'
    ]  # fmt: skip


def test_the_refusals_are_those_of_its_real_account_as_well(run: Run) -> None:
    """By its token, whatever a test can act as."""
    for command, refused in {
        "kubectl get nodes": "cannot list resource",
        "kubectl get --raw /api/v1/nodes/lab/proxy/pods": "cannot get resource",
        f"kubectl get pods -n {run.namespace}": "cannot list resource",
        "kubectl get secrets -n kube-system": "cannot list resource",
        "kubectl get pods --as=system:admin": "cannot impersonate",
        "kubectl delete networkpolicy default-deny": "kinds: ",
        "kubectl delete resourcequota blastdoor": "kinds: ",
        "kubectl label namespace scenario pod-security.kubernetes.io/enforce=privileged --overwrite": "kinds: ",
        "kubectl create token default": "kinds: ",
        "kubectl create token sandbox -n blastdoor-system": "cannot create resource",
        "kubectl create clusterrolebinding x --clusterrole=cluster-admin --user=x": "cannot create resource",
        "kubectl create rolebinding x --clusterrole=view --serviceaccount=scenario:default": "rolebindings: ",
    }.items():
        assert refused in run.said(command), command


def test_a_group_that_came_while_the_cluster_was_made_is_not_the_scenarios(run: Run) -> None:
    account = run.own.acting_as(f"system:serviceaccount:{run.namespace}:sandbox")

    def refused(group: str) -> str:
        return refusal(lambda: account.raw("POST", f"{CRDS}?dryRun=All", body=definition(group)))

    assert "group: " in refused(LATE)
    assert refused("early.example.net") == ""
    account.close()


@pytest.mark.parametrize("rules", ["pods", "writes", "contents", "definitions", "defaults"])
def test_a_policy_that_is_not_in_force_is_found_before_the_scenario_comes(run: Run, image: str, rules: str) -> None:
    admin, name = run.own.admin, f"blastdoor-own-api-{rules}"
    account = run.own.acting_as(f"system:serviceaccount:{run.namespace}:sandbox")
    kind = "MutatingAdmissionPolicyBinding" if rules == "defaults" else "ValidatingAdmissionPolicyBinding"
    (binding,) = own_api_policies(run.own, kind, name)

    def fault() -> str | None:
        return own_api_fault(account, image=image, runtime_class="gvisor", groups=[LATE])

    eventually(lambda: fault() is None, lambda: str(fault()), 30)
    admin.delete(kind, name)
    try:
        eventually(lambda: fault() is not None, seconds=30)
    finally:
        admin.apply(binding)
    eventually(lambda: fault() is None, lambda: str(fault()), 30)
    account.close()


def test_the_token_is_the_pods_own_short_and_to_be_read_by_nobody_else(run: Run) -> None:
    listed = run.said(f"cd {FOLDER} && stat -L -c '%a %n' token kubeconfig ca.crt; id -u; stat -L -c %u token")
    *modes, uid, owner = listed.splitlines()
    assert modes == ["600 token", "444 kubeconfig", "444 ca.crt"]
    assert uid == owner
    assert "Read-only file system" in run.said(f"touch {FOLDER}/more")
    middle = run.said(f"cat {FOLDER}/token").strip().split(".")[1]
    body = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    assert body["exp"] - body["iat"] <= 600
    assert body["kubernetes.io"]["pod"]["name"] == run.name
    assert run.said('echo "$KUBECONFIG"') == f"{KUBECONFIG}\n"


# --- What it reaches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ears(lab: Lab) -> Iterator[Ears]:
    with listening(lab, "heard") as ears:
        yield ears


def _targets(own: Own, other: str) -> list[str]:
    (api,) = own.endpoints
    anything_else = [f"{ADDRESS}:{KUBELET}", f"{ADDRESS}:80", f"{METADATA[0]}:80", f"{NEIGHBOUR}:80", f"{other}:8080"]
    return [*anything_else, f"{api[0]}:{api[1]}"]


@pytest.fixture(scope="module")
def other(run: Run, image: str) -> Iterator[str]:
    """-> the address of a pod of somebody else's, which listens."""
    admin, name = run.own.admin, "somebody-else"
    admin.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    eventually(lambda: admin.get("ServiceAccount", "default", name) is not None)
    container = {"name": "main", "image": image, "command": ["/bin/sh", "-c", "while true; do nc -l -p 8080; done"]}
    spec = {"containers": [container], "terminationGracePeriodSeconds": 0}
    admin.create(make("Pod", "v1", "other", name, spec=spec))
    try:
        yield eventually(lambda: _address(admin.get("Pod", "other", name)))
    finally:
        admin.delete("Namespace", name)
        eventually(lambda: admin.get("Namespace", name) is None)


def _address(pod: Manifest | None) -> str:
    status = (pod or {}).get("status", {})
    return str(status.get("podIP", "")) if status.get("phase") == "Running" else ""


def test_the_pod_reaches_its_api_server_and_nothing_else(run: Run, ears: Ears, other: str) -> None:
    """Not the kubelet, the metadata address, another pod, another machine, the node; nor any of it by name. With one
    more policy, which lets everything out, the very same line reaches all of it."""
    (api,) = run.own.endpoints
    targets = _targets(run.own, other)
    command = REACH % " ".join(targets)
    assert run.said(command).split() == ["REACHED", f"{api[0]}:{api[1]}"]
    assert not ears.heard("tcp")
    assert _observed(run) == "own-api"
    everything = make("NetworkPolicy", "networking.k8s.io/v1", "control", run.namespace, spec={
        "podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]})  # fmt: skip
    run.inside.engine.apply(everything)
    try:
        assert _observed(run) == "open", "what is observed is told, and not what was asked for"
        eventually(lambda: [one for one in targets if one not in run.said(command)] == [],
                   lambda: run.said(command), 60)  # fmt: skip
    finally:
        run.own.admin.delete("NetworkPolicy", "control", run.namespace)
    eventually(lambda: run.said(command).split() == ["REACHED", f"{api[0]}:{api[1]}"], lambda: run.said(command), 60)


def _observed(run: Run) -> str | None:
    """What its evidence says of the network. A run looks once, this here each time."""
    run.sandbox._pod._evidence = None
    return run.sandbox.evidence().network


def test_a_pod_that_the_scenario_makes_reaches_no_more(run: Run, image: str, other: str) -> None:
    targets = _targets(run.own, other)
    (api,) = run.own.endpoints
    # Its policy comes into force moments after it began.
    command = f"sleep 5; {REACH % ' '.join(targets)}; dmesg | sed -n 1,3p"
    container = {"name": "main", "image": image, "command": ["/bin/sh", "-c", command]}
    pod = make("Pod", "v1", "reaches", spec={"restartPolicy": "Never", "containers": [container]})
    as_scenario = run.own.acting_as(f"system:serviceaccount:{run.namespace}:sandbox")
    as_scenario.create(pod)
    said = eventually(lambda: _ended(run, "reaches"))
    assert [line for line in said.splitlines() if "REACHED" in line] == [f"REACHED {api[0]}:{api[1]}"]
    assert "gVisor" in said
    as_scenario.delete("Pod", "reaches", NAMESPACE)
    as_scenario.close()


def _ended(run: Run, name: str) -> str:
    found = run.own.admin.get("Pod", name, NAMESPACE) or {}
    if found.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
        return ""
    return run.said(f"kubectl logs {name}")


# --- An operator ------------------------------------------------------------------------------------------------------


def test_a_customers_operator_is_installed_and_reconciles_its_custom_resource(run: Run) -> None:
    """The example, played as a worker plays it and judged as a worker judges it."""
    controls = parse_controls((EXAMPLE / "controls.yaml").read_bytes())
    assert controls.needs == SPEC.needs
    scenario = parse_scenario((EXAMPLE / "scenario.yaml").read_bytes())
    for n, step in enumerate(scenario.steps, 1):
        timeout_s = step.timeout.total_seconds() if step.timeout else 90
        spec = StepSpec(n=n, argv=step.argv, env=scenario.environment(step), stdin=b"", timeout_s=timeout_s)
        done = run.sandbox.execute(spec)
        judged = judge_step(n, step, done)
        said = f"{step.name}:\n{done.stdout.data.decode()}\n{done.stderr.data.decode()}"
        assert judged.result.outcome == "passed", f"{said}\n{_explained(run)}"
    pods = run.own.admin.list("Pod", NAMESPACE, labels={"app": "greeter"})
    assert [pod["spec"]["runtimeClassName"] for pod in pods] == ["gvisor"]
    assert run.own.admin.get("Pod", "on-the-host", NAMESPACE) is None


def _packed(path: Path, files: Sequence[Path]) -> Bundle:
    content = 0
    with tarfile.open(path, "w:gz") as tar:
        for file in files:
            data = file.read_bytes()
            entry = tarfile.TarInfo(file.name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
            content += len(data)
    return Bundle(digest="x", bytes_=path.stat().st_size, files=len(files), content_bytes=content, path=path)


def _explained(run: Run) -> str:
    events = [f"{one['reason']}: {one['message']}" for one in run.own.admin.list("Event", NAMESPACE)]
    return "\n".join([*events, run.said("kubectl logs deployment/greeter --tail=30")])
