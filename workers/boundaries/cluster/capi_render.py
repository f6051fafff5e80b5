"""PURE: what is asked of a management cluster, and what its answers say.

The shape of a cluster is the platform team's: a folder of templates (`cluster_templates/capi/`). What is ours is put
on here, where no template can leave it out: names, namespace, and the labels that carry the whole reference. Nothing
of the run's bundle, scenario or tenant is in it but a hash.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from service.core.boundary import BoundaryKind, BoundaryRef
from workers.kube import PREFIX, Manifest, filled, placeholders
from workers.kube.manifests import FOLDER
from workers.pods.render import as_label, labels

VARIANT = "capi"
GROUP = "cluster.x-k8s.io"
"""Cluster API's own; its providers' end with it."""
VERSIONS = ("v1beta2", "v1beta1")
"""Of the group, those whose conditions we can read: Cluster API 1.11 and later serves both, 1.0 to 1.10 the second."""
CLUSTER_NAME = f"{GROUP}/cluster-name"
"""The label that Cluster API puts on all that belongs to a cluster."""
SECRET_TYPE = f"{GROUP}/secret"
SHIPPED = FOLDER / "capi" / "topology"
_PLACES = frozenset({"name", "namespace"})
_NAME = re.compile(r"\{\{name\}\}(-[a-z0-9]([a-z0-9-]{0,14}[a-z0-9])?)?")
_PRETENDED = re.compile(r"(Docker|Dev|InMemory)(Cluster|Machine)")
_RUN_ID = re.compile(r"run_[0-9a-f]{32}")
_MOST_BYTES = 256 * 1024
"""Of a kubeconfig: a real one has some ten thousand."""


class TopologyFault(ValueError):
    """The templates are none that a run could be made from; the message says which one and why."""


class KubeconfigFault(ValueError):
    """What the secret holds is no kubeconfig that we would use; the message says why."""


# --- The templates ----------------------------------------------------------------------------------------------------


def read_topology(folder: Path) -> Sequence[Manifest]:
    """All documents of a folder's `*.yaml`, the Cluster last: what it refers to is there before it is. Raises
    TopologyFault."""
    try:
        files = sorted(folder.glob("*.yaml"))
        found = [one for file in files for one in yaml.safe_load_all(file.read_text("utf-8")) if one is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TopologyFault(f"{folder} cannot be read: {error}") from error
    if not all(isinstance(one, dict) for one in found):
        raise TopologyFault(f"{folder}: a document is no mapping")
    clusters = [one for one in found if _is_cluster(one)]
    if len(clusters) != 1:
        raise TopologyFault(f"{folder} has {len(clusters)} documents of kind Cluster ({GROUP}): it must have one")
    if why := [why for one in found for why in _faults(one)]:
        raise TopologyFault("; ".join(why))
    if len({(one["apiVersion"], one["kind"], one["metadata"]["name"]) for one in found}) < len(found):
        raise TopologyFault(f"{folder} has two documents of one kind and name")
    return [*(one for one in found if not _is_cluster(one)), *clusters]


def digest(topology: Sequence[Manifest]) -> str:
    """Of what the templates say; comments and their order of keys aside."""
    said = json.dumps(list(topology), sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(said.encode()).hexdigest()}"


def group_of(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("apiVersion", "")).rpartition("/")[0]


def is_capi(group: str) -> bool:
    return group == GROUP or group.endswith(f".{GROUP}")


def _is_cluster(manifest: Manifest) -> bool:
    return group_of(manifest) == GROUP and manifest.get("kind") == "Cluster"


def _faults(manifest: Manifest) -> list[str]:
    """A team may write into these documents whatever its provider knows, but not whose they are."""
    metadata = manifest.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(manifest.get("kind"), str) or "/" not in str(
        manifest.get("apiVersion")
    ):  # fmt: skip
        return ["a document without apiVersion (with a group), kind or metadata"]
    what = f"{manifest['kind']} {metadata.get('name')}"
    found = []
    if not is_capi(group_of(manifest)):
        found.append(f"{what} is of no group of Cluster API")
    if not _NAME.fullmatch(str(metadata.get("name"))):
        found.append(f"{what}: its name must be {{{{name}}}}, or that and a short ending: it is of one run")
    if metadata.get("namespace", "{{namespace}}") != "{{namespace}}":
        found.append(f"{what}: its namespace is a setting")
    if taken := sorted(set(metadata) - {"name", "namespace", "labels", "annotations"}):
        found.append(f"{what}: metadata.{taken[0]} is not a template's to say")
    for part in ("labels", "annotations"):
        if any(key.startswith(PREFIX) or key == CLUSTER_NAME for key in metadata.get(part) or {}):
            found.append(f"{what}: {part} of ours, or Cluster API's, are not a template's to say")
    if unknown := sorted(placeholders(manifest) - _PLACES):
        found.append(f"{what}: no value for {{{{{unknown[0]}}}}}")
    return found + (_cluster_faults(manifest, what) if _is_cluster(manifest) else [])


def _cluster_faults(manifest: Manifest, what: str) -> list[str]:
    spec = manifest.get("spec") or {}
    found = []
    if manifest["metadata"].get("name") != "{{name}}":
        found.append(f"{what}: the Cluster's name must be {{{{name}}}}")
    if (version := manifest["apiVersion"].rpartition("/")[2]) not in VERSIONS:
        found.append(f"{what}: version {version} is not known here, but {' and '.join(VERSIONS)} are")
    if not (spec.get("topology") or (spec.get("infrastructureRef") and spec.get("controlPlaneRef"))):
        found.append(f"{what}: it needs spec.topology, or infrastructureRef and controlPlaneRef")
    if spec.get("paused"):
        found.append(f"{what}: it is paused, and would never be made")
    return found


def class_of(topology: Sequence[Manifest]) -> tuple[str, str | None] | None:
    """Name and namespace of the ClusterClass that the Cluster asks for; None: it asks for none."""
    said = topology[-1]["spec"].get("topology") or {}
    ref = said.get("classRef") or {}
    name = ref.get("name") or said.get("class")
    return (str(name), ref.get("namespace") or said.get("classNamespace")) if name else None


def pretended(documents: Any) -> Sequence[str]:
    """The kinds in these documents, and in what they refer to, whose machines are none: containers of one host that
    share its kernel, or nothing at all. They are Cluster API's own, for development."""
    if isinstance(documents, Mapping):
        kind = documents.get("kind")
        here = {kind} if isinstance(kind, str) and _PRETENDED.match(kind) else set()
        return sorted(here.union(*map(pretended, documents.values())))
    if isinstance(documents, Sequence) and not isinstance(documents, str):
        return sorted(set().union(*map(pretended, documents)))
    return []


def kubernetes_version(topology: Sequence[Manifest]) -> str:
    """Of the clusters to be made, as the templates say it; empty when plain objects do not say it in one place."""
    found = {str((one.get("spec") or {}).get("version") or "") for one in topology}
    found.add(str((topology[-1]["spec"].get("topology") or {}).get("version") or ""))
    return min(found - {""}, default="")


# --- What is asked for ------------------------------------------------------------------------------------------------


def render_cluster(ref: BoundaryRef, topology: Sequence[Manifest], *, namespace: str) -> Sequence[Manifest]:
    """The documents of one run, in the order to apply."""
    values = {"name": ref.name, "namespace": namespace}
    made = [filled(one, {key: values[key] for key in placeholders(one)}) for one in topology]
    for one in made:
        said = one["metadata"]
        said["namespace"] = namespace
        said["labels"] = (said.get("labels") or {}) | labels(ref) | {CLUSTER_NAME: ref.name}
    return made


def mine(installation: str, site: str) -> dict[str, str]:
    """What stands on all that is of one installation and site."""
    return {
        PREFIX + "managed": "true",
        PREFIX + "installation": installation,
        PREFIX + "kind": BoundaryKind.CLUSTER.value,
        PREFIX + "variant": VARIANT,
        PREFIX + "site": as_label(site),
    }


def render_place(ref: BoundaryRef, n: int, *, namespace: str) -> Manifest:
    """One of so many places for clusters, taken by who makes it: the API server lets one object have a name, so there
    is no moment in which two could count themselves in. It is there before anything else of its run, and goes last."""
    whose = hashlib.sha256(f"{ref.installation}/{ref.site}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": f"blastdoor-{whose}-{n}", "namespace": namespace, "labels": labels(ref)},
        "spec": {"holderIdentity": ref.name},
    }


def read_ref(found: Manifest, *, site: str) -> BoundaryRef | None:
    """The reference that stands on an object; None when it is not one of ours. Its tenant is the hash. `site`: what
    this site is called, whose label may be a hash."""
    said = {
        key.removeprefix(PREFIX): str(value)
        for key, value in (found["metadata"].get("labels") or {}).items()
        if key.startswith(PREFIX)
    }
    if (said.get("kind"), said.get("variant")) != (BoundaryKind.CLUSTER.value, VARIANT):
        return None
    if not _RUN_ID.fullmatch(said.get("run", "")):
        return None
    try:
        return BoundaryRef(
            installation=said["installation"], kind=BoundaryKind.CLUSTER, variant=VARIANT,
            site=site if said["site"] == as_label(site) else said["site"], tenant=said["tenant-hash"],
            run_id=said["run"], fence=int(said["fence"]),
            expires_at=datetime.fromtimestamp(int(said["expires-at"]), UTC),
        )  # fmt: skip
    except (KeyError, ValueError, OverflowError):
        return None


def is_of(found: Manifest, ref: BoundaryRef) -> bool:
    said = found["metadata"].get("labels") or {}
    wanted = labels(ref)
    return all(said.get(PREFIX + key) == wanted[PREFIX + key] for key in ("installation", "kind", "run", "fence"))


# --- What a Cluster says of itself ------------------------------------------------------------------------------------

_STEPS = (  # condition -> what it means for who waits
    (("InfrastructureReady",), "its infrastructure is there"),
    (("ControlPlaneInitialized",), "its control plane has begun"),
    (("ControlPlaneAvailable", "ControlPlaneReady"), "its control plane is there"),
    (("WorkersAvailable",), "its nodes are there"),
)


@dataclass(frozen=True)
class Standing:
    """`done`: what is reached, in words for who waits; `waits`: what it says that it waits for; `failed`: why it will
    not come, as far as it knows."""

    ready: bool
    done: Sequence[str]
    waits: str
    failed: str


def standing(cluster: Manifest) -> Standing:
    """By its conditions: in v1beta2 `Available`, which has control plane and workers in it; in v1beta1 the same where
    the release knows it, else `Ready`, which does not look at workers. What was observed of an older generation counts
    for nothing."""
    status = cluster.get("status") or {}
    old = str(cluster["apiVersion"]).endswith("/v1beta1")
    newer = (status.get("v1beta2") or {}).get("conditions") or () if old else ()
    rows = [*(status.get("conditions") or ()), *newer]
    generation = cluster["metadata"].get("generation", 0)
    said = {str(row["type"]): row for row in rows if row.get("observedGeneration", generation) >= generation}
    summary = "Ready" if old and "Available" not in said else "Available"
    true = {kind for kind, row in said.items() if row["status"] == "True"}
    return Standing(
        ready=summary in true and not _ending(cluster),
        done=[text for kinds, text in _STEPS if true & set(kinds)],
        waits=_waits(said, summary),
        failed=_failed(status),
    )


def _waits(said: Mapping[str, Manifest], summary: str) -> str:
    for kind in (*(kind for kinds, _ in _STEPS for kind in kinds), summary):
        row = said.get(kind)
        if row is not None and row["status"] != "True":
            words = ": ".join(filter(None, (kind, row.get("reason"), row.get("message"))))
            return " ".join(words.split())[:300]
    return "" if summary in said else f"no condition {summary} yet"


def _failed(status: Mapping[str, Any]) -> str:
    terminal = {**status, **((status.get("deprecated") or {}).get("v1beta1") or {})}
    if status.get("phase") == "Failed" or terminal.get("failureReason") or terminal.get("failureMessage"):
        words = (terminal.get("failureReason"), terminal.get("failureMessage"))
        return ": ".join(str(word) for word in words if word)[:300] or "its phase is Failed"
    return ""


def _ending(found: Manifest) -> bool:
    return "deletionTimestamp" in found["metadata"]


def held_by(found: Manifest) -> str:
    """Why the management cluster does not let go of it, in its own words."""
    kind, metadata = found.get("kind", "object"), found["metadata"]
    finalizers = metadata.get("finalizers") or ()
    if not _ending(found):
        return f"{kind} {metadata['name']} is not asked to end"
    said = [
        " ".join(f"{row.get('reason')}: {row['message']}".split())
        for row in (found.get("status") or {}).get("conditions") or ()
        if row.get("type") == "Deleting" and row.get("message")
    ]
    held = f"held by {', '.join(finalizers)}" if finalizers else "not gone yet"
    return f"{kind} {metadata['name']} {'; '.join([held, *said])}"[:400]


# --- Its kubeconfig ---------------------------------------------------------------------------------------------------


def kubeconfig_of(secret: Manifest, name: str) -> str:
    """-> a kubeconfig made anew from the few things that we checked; nothing else that the secret says is written.

    A kubeconfig can name programs to run and files to read on the machine that uses it, and can turn off the check of
    who answers: none of that is taken. Raises KubeconfigFault.
    """
    if secret.get("type") != SECRET_TYPE or (secret["metadata"].get("labels") or {}).get(CLUSTER_NAME) != name:
        raise KubeconfigFault(f"it is no secret of type {SECRET_TYPE} with the label {CLUSTER_NAME}={name}")
    try:
        raw = base64.b64decode(str((secret.get("data") or {}).get("value") or ""), validate=True)
        said: Any = yaml.safe_load(raw) if len(raw) <= _MOST_BYTES else None
        context = _named(said["contexts"], said["current-context"])["context"]
        cluster = _named(said["clusters"], context["cluster"])["cluster"]
        user = _named(said["users"], context["user"])["user"]
        return json.dumps(_kubeconfig(name, cluster, user), indent=1)
    except KubeconfigFault:
        raise
    except (binascii.Error, yaml.YAMLError, RecursionError, KeyError, TypeError, ValueError) as error:
        raise KubeconfigFault(f"it holds no kubeconfig ({type(error).__name__})") from error


def _named(rows: Any, name: str) -> Mapping[str, Any]:
    (found,) = [row for row in rows if row["name"] == name]
    return dict(found)


def _kubeconfig(name: str, cluster: Mapping[str, Any], user: Mapping[str, Any]) -> Manifest:
    if more := sorted(set(cluster) - {"server", "certificate-authority-data", "tls-server-name"}):
        raise KubeconfigFault(f"its cluster says {more[0]}, which is not taken")
    if more := sorted(set(user) - {"client-certificate-data", "client-key-data", "token"}):
        raise KubeconfigFault(f"its user says {more[0]}, which is not taken")
    if not all(isinstance(value, str) for value in (*cluster.values(), *user.values())):
        raise KubeconfigFault("what it says is no text")
    server = urlsplit(cluster["server"])
    if server.scheme != "https" or not server.hostname or server.username or server.query:
        raise KubeconfigFault("its server is no https address")
    for key, text in (("certificate-authority-data", cluster), ("client-certificate-data", user)):
        if key in text and b"-----BEGIN CERTIFICATE-----" not in base64.b64decode(text[key], validate=True):
            raise KubeconfigFault(f"its {key} is no certificate")
    if "certificate-authority-data" not in cluster:
        raise KubeconfigFault("it does not say who signs the API server's certificate")
    if not (user.get("token") or (user.get("client-certificate-data") and user.get("client-key-data"))):
        raise KubeconfigFault("it has neither a client's certificate with its key, nor a token")
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": dict(cluster)}],
        "users": [{"name": "administrator", "user": dict(user)}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": "administrator"}}],
        "current-context": name,
    }
