"""`blastdoor doctor --attack` against the pods of a cluster; and against clusters and walls with one defence missing,
where the very same command must fail: a verdict out of reach would prove nothing."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from service.core.boundary import BoundaryKind, Cancellation, Execution, StepSpec
from tests.cluster.lab.outside import Lab
from tests.cluster.namespaces import Site, sweep
from tests.cluster.pods import eventually
from tests.cluster.python_image import load_python
from workers.boundaries.namespace import probe
from workers.boundaries.namespace.driver import NamespaceBoundary, NamespaceHost
from workers.cli import commands
from workers.conformance.corpus import CASES
from workers.conformance.run import Arena, Outcome
from workers.conformance.stage import set_stage
from workers.pods import pod
from workers.pods.sandbox import PodSandbox
from workers.registry import DRIVERS

BY_ID = {case.id: case for case in CASES}


@dataclass(frozen=True)
class Target:
    site: Site
    lab: Lab
    image: str


@pytest.fixture(scope="module")
def target(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Target:
    if site.lab is None:
        pytest.skip("only a lab can be broken on purpose")
    return Target(site, site.lab, load_python(site.lab, tmp_path_factory.mktemp("image") / "python.tar"))


@dataclass(frozen=True)
class Said:
    status: int
    document: dict[str, Any]
    log: str

    def outcomes(self) -> dict[str, str]:
        return {f"{row['id']} {row['boundary']}": row["outcome"] for row in self.document["cases"]}

    def missing(self, boundary: str) -> str:
        return "; ".join(self.document["not_built"].get(boundary, ()))


def doctor(target: Target, monkeypatch: pytest.MonkeyPatch, folder: Path, *cases: str) -> Said:
    """The command, which here is asked about the cluster alone and plays these cases alone."""
    monkeypatch.setattr("workers.cli.DRIVERS", {BoundaryKind.NAMESPACE: DRIVERS[BoundaryKind.NAMESPACE]})
    monkeypatch.setattr("workers.cli.CASES", tuple(BY_ID[case] for case in cases))
    monkeypatch.setattr(probe, "_passed", {})  # as in a process of its own
    before = structlog.get_config()
    argv = ["doctor", "--attack", "--json", "--state", str(folder / "state"), "--runtime-dir", str(folder / "run")]
    argv += ["--kubeconfig", str(target.site.ready.engine_kubeconfig), "--kube-image", target.image]
    try:
        result = CliRunner().invoke(commands, argv)
    finally:
        structlog.configure(**before)
    assert result.stdout, result.output
    mine = {"blastdoor.dev/installation": f"doctor{os.getpid()}"}
    admin = target.site.ready.admin
    # Its listener's too: the next one here has the same installation, and must not meet what is on its way out.
    eventually(lambda: all(map(_kept, admin.list("Namespace", labels=mine))))
    return Said(result.exit_code, json.loads(result.stdout), result.stderr)


def _kept(namespace: dict[str, Any]) -> bool:
    return str(namespace["metadata"]["name"]).startswith("bd-t-")


def test_it_says_of_each_case_and_wall_how_it_went(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = doctor(target, monkeypatch, tmp_path, "D23", "D30")
    walls = ("namespace/runc", "namespace/gvisor")
    assert said.outcomes() == {f"{case} {wall}": "blocked" for wall in walls for case in ("D23", "D30")}, said
    assert said.status == 0
    assert "D30   namespace/gvisor: blocked" in said.log
    assert said.document["not_built"] == {}


# --- clusters with one defence missing ---


@contextmanager
def inert(lab: Lab) -> Iterator[None]:
    """The network policy controller is installed and runs, and enforces nothing."""
    controller = lab.pid("policy")
    os.kill(controller, signal.SIGUSR1)
    try:
        eventually(lambda: "blastdoor_lab" not in lab.run("nft", "list", "tables"))
        yield
    finally:
        os.kill(controller, signal.SIGUSR2)
        eventually(lambda: "blastdoor_lab" in lab.run("nft", "list", "tables"))


def test_a_cluster_whose_network_policy_is_inert_fails_and_it_is_said_why(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pod, "_SHUT_S", 4.0)
    with inert(target.lab):
        said = doctor(target, monkeypatch, tmp_path, "D33")
    assert said.status == 1
    assert said.outcomes() == {}, "no attack is played where no wall can be built"
    for wall in ("namespace/runc", "namespace/gvisor"):
        assert "network policy" in said.missing(wall)


def test_a_runtime_class_called_gvisor_that_is_runc_fails_and_the_other_wall_is_judged(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    admin = target.site.ready.admin
    real = admin.get("RuntimeClass", "gvisor")
    assert real is not None
    known = {key: real[key] for key in ("apiVersion", "kind", "handler", "overhead", "scheduling") if key in real}
    metadata = {"name": "gvisor", "labels": real["metadata"].get("labels", {})}
    admin.delete("RuntimeClass", "gvisor")
    admin.create({**known, "metadata": metadata, "handler": "runc"})
    try:
        said = doctor(target, monkeypatch, tmp_path, "D33")
    finally:
        admin.delete("RuntimeClass", "gvisor")
        admin.create({**known, "metadata": metadata})
    assert said.status == 1
    assert "RuntimeClass gvisor" in said.missing("namespace/gvisor")
    assert said.outcomes() == {"D33 namespace/runc": "blocked"}, said.document["not_built"]


# --- walls with one defence missing: each exists in this file only ---


@pytest.fixture
def arena(target: Target) -> Iterator[Arena]:
    host = target.site.host("runc")
    boundary = NamespaceBoundary(
        NamespaceHost(
            installation=host.installation, site="here", kubeconfig=host.kubeconfig, image=target.image,
            variants=("runc",),
        )
    )  # fmt: skip
    with (
        set_stage() as stage,
        Arena(
            boundary, stage, name="namespace/runc", installation=host.installation, site="here",
            nearby=boundary.surroundings(),
        ) as made,
    ):  # fmt: skip
        yield made
    assert sweep(boundary, target.site.ready) == []


def test_a_policy_that_stops_being_enforced_fails_the_case_of_the_listeners(
    target: Target, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only once the pod stands: before, neither the driver nor our program in the pod would play a step."""
    await_shut = pod.Pod.await_shut
    with ExitStack() as stack:

        def then_open(made: pod.Pod, cancelled: Cancellation) -> tuple[int, float]:
            found = await_shut(made, cancelled)
            stack.enter_context(inert(target.lab))
            return found

        monkeypatch.setattr(pod.Pod, "await_shut", then_open)
        result = arena.judge(BY_ID["D27"])
    assert (result.outcome, result.why.startswith("reached ")) == (Outcome.FAILED, True), result
    assert " 4711" in result.why
    assert " 10250" in result.why


def test_an_engine_that_hands_on_its_environment_fails_the_case_of_the_environment(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = PodSandbox.execute

    def careless(sandbox: PodSandbox, step: StepSpec, **more: Any) -> Execution:
        return execute(
            sandbox, step.model_copy(update={"env": dict(step.env) | {"KUBERNETES_SERVICE_HOST": "x"}}), **more
        )

    monkeypatch.setattr(PodSandbox, "execute", careless)
    assert arena.judge(BY_ID["D30"]).why == "named KUBERNETES_SERVICE_HOST"
    assert "KUBERNETES_SERVICE_HOST" in arena.judge(BY_ID["D29"]).why
