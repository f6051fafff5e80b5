"""`blastdoor cluster`: what it applies, what it says of a cluster that has it, and of one where something is amiss."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.cluster.engines import CHOICES, IMAGE_PREFIX, Ready, ready
from tests.cluster.namespaces import Site
from tests.cluster.pods import eventually
from workers.cluster_cli import cluster
from workers.kube import Cluster, Manifest
from workers.kube.install import wanted

__all__ = ["ready"]
OURS = ["--image", IMAGE_PREFIX, "--pool", ""]


def ran(command: str, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cluster, [command, *arguments])
    return done.exit_code, done.output


def defences(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """-> the exit status, and what is said of each defence; its standard output is one JSON document."""
    done = CliRunner().invoke(cluster, ["check", *arguments, "--json"])
    return done.exit_code, {row["defence"]: row for row in json.loads(done.stdout)["defences"]}


def states(kubeconfig: Path) -> tuple[int, dict[str, str]]:
    """-> the exit status, and the state of each defence."""
    status, found = defences("--kubeconfig", str(kubeconfig), *OURS)
    return status, {name: row["state"] for name, row in found.items()}


@pytest.fixture
def restored(ready: Ready) -> Iterator[Callable[[str, str], Manifest]]:
    """A function that finds one of the installed manifests; what a test does to them is undone."""
    manifests = {(one["kind"], one["metadata"]["name"]): one for one in wanted(CHOICES)}
    yield lambda kind, name: manifests[kind, name]
    for manifest in manifests.values():
        ready.admin.apply(manifest)
    eventually(lambda: states(ready.kubeconfig)[0] == 0, lambda: str(states(ready.kubeconfig)))


def test_a_cluster_that_was_made_ready_holds_in_every_line(ready: Ready) -> None:
    status, found = states(ready.kubeconfig)
    assert status == 0
    tried = {defence for defence, state in found.items() if state == "enforced"}
    assert set(found.values()) == {"present", "enforced", "untried"}
    assert [defence for defence, state in found.items() if state == "untried"] == ["sandboxes"]
    assert {"PodSecurity", "admission of pods", "quota", "exec by another", "the engine elsewhere"} <= tried
    assert {"flow control", "priority", "rights of the engine"} <= tried


def test_the_table_says_of_each_whether_it_is_there_and_whether_it_held(ready: Ready) -> None:
    status, said = ran("check", "--kubeconfig", str(ready.kubeconfig), *OURS)
    assert status == 0
    lines = {line.split("  ")[0]: line.split() for line in said.splitlines()}
    assert lines["defence"] == ["defence", "present", "enforced"]
    assert lines["admission of pods"][3:6] == ["present", "enforced", "refused,"]
    assert lines["PodSecurity"][1:3] == [
        "-",
        "enforced",
    ]  # it stands in each run's namespace, not in what was installed
    assert lines["RuntimeClass kata-fc"][2:] == ["present", "-"]
    assert "Nothing amiss." in said


def test_installing_says_what_it_applies_and_may_be_done_again(ready: Ready) -> None:
    for more in ([], ["--dry-run"]):
        status, said = ran("install", "--kubeconfig", str(ready.kubeconfig), *OURS, *more)
        assert status == 0, said
        assert "ValidatingAdmissionPolicy blastdoor-pods" in said.splitlines()
    assert states(ready.kubeconfig)[0] == 0


@pytest.mark.parametrize(
    ("kind", "name", "amiss"),
    [
        ("ValidatingAdmissionPolicyBinding", "blastdoor-pods", "admission of pods"),
        ("ValidatingAdmissionPolicyBinding", "blastdoor-interactive", "exec by another"),
        ("ValidatingAdmissionPolicyBinding", "blastdoor-contents", "contents by another"),
        ("ValidatingAdmissionPolicyBinding", "blastdoor-namespaces", "our labels by another"),
        ("ValidatingAdmissionPolicyBinding", "blastdoor-engine", "the engine elsewhere"),
        ("FlowSchema", "blastdoor-engine", "flow control"),
    ],
)
def test_what_was_taken_away_is_missing_and_what_it_did_is_no_longer_done(
    ready: Ready, restored: object, kind: str, name: str, amiss: str
) -> None:
    ready.admin.delete(kind, name)
    found = eventually(lambda: seen if (seen := states(ready.kubeconfig)[1])[amiss] == "inert" else {})
    assert found[f"{kind} {name}"] == "missing"
    assert states(ready.kubeconfig)[0] == 1


def test_a_policy_that_only_warns_differs_and_is_inert(ready: Ready, restored: Callable[[str, str], Manifest]) -> None:
    binding = restored("ValidatingAdmissionPolicyBinding", "blastdoor-pods")
    ready.admin.apply(binding | {"spec": binding["spec"] | {"validationActions": ["Warn"]}})
    found = eventually(lambda: seen if (seen := states(ready.kubeconfig)[1])["admission of pods"] == "inert" else {})
    assert found["ValidatingAdmissionPolicyBinding blastdoor-pods"] == "differs"


def test_a_sandbox_that_is_made_shows_its_kernel(site: Site, restored: Callable[[str, str], Manifest]) -> None:
    """And where the class is there but another runtime answers to its name, that is what is said. (A controller of
    network policy that is there but inert: test_namespace_probe.)"""
    given = ["--kubeconfig", str(site.ready.kubeconfig), "--image", site.image, "--pool", ""]
    assert ran("install", *given)[0] == 0

    def tried() -> dict[str, dict[str, str]]:
        return {name: row for name, row in defences(*given)[1].items() if name.startswith(("sandboxes", "Runtime"))}

    found = eventually(lambda: seen if (seen := tried())["sandboxes namespace/gvisor"]["state"] == "enforced" else {})
    assert found["sandboxes namespace/runc"]["state"] == "enforced"
    gvisor = restored("RuntimeClass", "gvisor")
    site.ready.admin.delete("RuntimeClass", "gvisor")
    try:
        site.ready.admin.create(gvisor | {"handler": "runc"})
        found = tried()
    finally:
        site.ready.admin.delete("RuntimeClass", "gvisor")  # a handler is never changed, so it is made anew
    assert found["RuntimeClass gvisor"] == {"defence": "RuntimeClass gvisor", "state": "differs", "detail": "handler"}
    assert found["sandboxes namespace/gvisor"]["state"] == "inert"
    assert "its handler 'runc' shares the node's kernel" in found["sandboxes namespace/gvisor"]["detail"]
    assert found["sandboxes namespace/runc"]["state"] == "enforced"


def test_rights_that_were_added_are_named(ready: Ready, restored: object) -> None:
    role: dict[str, Any] = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "too-much"},
        "rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}],
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "too-much"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "too-much"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": CHOICES.engine}],
    }
    ready.admin.apply(role)
    ready.admin.apply(binding)
    try:
        said = eventually(
            lambda: (
                text
                if "it can get secrets" in (text := ran("check", "--kubeconfig", str(ready.kubeconfig), *OURS)[1])
                else ""
            )
        )
        assert "inert" in said
    finally:
        ready.admin.delete("ClusterRoleBinding", "too-much")
        ready.admin.delete("ClusterRole", "too-much")


def test_the_kubeconfig_for_workers_is_the_engines(ready: Ready, tmp_path: Path) -> None:
    status, said = ran("kubeconfig", "--kubeconfig", str(ready.kubeconfig), "--hours", "1")
    assert status == 0
    assert set(yaml.safe_load(said)["users"][0]["user"]) == {"token"}
    (tmp_path / "engine").write_text(said)
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    answer = Cluster.from_kubeconfig(tmp_path / "engine").raw(
        "POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", body=review
    )
    assert answer.body["status"]["userInfo"]["username"] == CHOICES.engine


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--image", "registry.example/x", "--pool", ""],
            "--image: 'registry.example/x': should be NAME@sha256:DIGEST",
        ),
        (["--image", "registry.example/x@sha256:12"], "should be NAME@sha256:DIGEST"),
        (["--image", ""], "should be NAME@sha256:DIGEST"),
        (["--image", "x/", "--engine", "it's"], "is no name for a user"),
        (["--image", "x/", "--pool", "sandboxes"], "--pool: 'sandboxes': should be KEY=VALUE"),
        (
            ["--image", "x/", "--kubeconfig", "/no/such/file"],
            "/no/such/file cannot be used as a kubeconfig: No such file",
        ),
    ],
)
@pytest.mark.parametrize("command", ["install", "check"])
def test_what_cannot_be_meant_is_said_in_one_line(
    tmp_path: Path, command: str, arguments: list[str], said: str
) -> None:
    (tmp_path / "kubeconfig").write_text("{}")
    status, found = ran(command, "--kubeconfig", str(tmp_path / "kubeconfig"), *arguments)
    assert (status, found.count("\n")) == (2, 1), found
    assert said in found


def _naming(server: str, **more: object) -> str:
    return json.dumps(
        {
            "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}],
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        } | more
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is empty"),
        ("a: [b", "no YAML: "),
        ("just words", "it has no clusters"),
        ("- 1", "it has no clusters"),
        ("\x00", "no YAML: "),
        (_naming(""), "its server is no URL such as https://HOST:6443: ''"),
        (_naming("10.0.0.1:6443"), "its server is no URL"),
        (_naming("https://127.0.0.1:1", **{"current-context": "another"}), "another"),
        (_naming("https://127.0.0.1:1", clusters=5), "it has not a kubeconfig's form"),
    ],
)
def test_what_is_no_kubeconfig_is_said_in_one_line_with_its_name(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(content)
    for arguments in (["install", "--image", "x/"], ["check", "--image", "x/"], ["kubeconfig"]):
        status, found = ran(*arguments, "--kubeconfig", str(file))
        assert (status, found.count("\n")) == (2, 1), found
        assert f"blastdoor: --kubeconfig: {file} cannot be used as a kubeconfig: " in found
        assert said in found


def test_a_server_that_nobody_answers_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.cluster_cli._PATIENCE_S", 0.3)
    file = tmp_path / "kubeconfig"
    file.write_text(_naming("https://127.0.0.1:1"))
    for command in ("install", "check"):
        status, found = ran(command, "--kubeconfig", str(file), "--image", "x/")
        assert (status, found.count("\n")) == (3, 1), found
        assert f"the API server that {file} names does not answer: " in found
        assert "127.0.0.1" in found
