"""`blastdoor cluster`: make a cluster ready for sandboxes, and say what it really enforces.

They come with a kubeconfig of somebody who may do everything there; workers come with the engine's, who may not.
"""

import base64
import json
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.core.boundary import NO_CLUSTERS, BoundaryKind, ClusterChoices
from workers.kube import Cluster, ClusterError, NoKubeconfig, Unreachable
from workers.kube.check import Row, State, check, matrix
from workers.kube.install import ENGINE, MAX_S, POOL, Choices, wanted
from workers.pods.image import ImageRefused, pack
from workers.registry import Warmable, load

cluster = typer.Typer(no_args_is_help=True, help="A Kubernetes cluster that sandboxes are made in.")
_COLOURS = {State.ENFORCED: "green", State.PRESENT: "green", State.UNTRIED: "yellow", State.DIFFERS: "yellow"}
_PROBED_WITHIN_S = 3600
_PATIENCE_S = 15.0
"""With an API server that is away: somebody sits and waits."""
_WIDE = 200
"""Columns, where nobody looks at a terminal."""

Kubeconfig = Annotated[
    Path, typer.Option(envvar="KUBECONFIG", help="Of an administrator of the cluster; one file.", show_default=False)
]
Image = Annotated[
    str,
    typer.Option(
        envvar="BLASTDOOR_KUBE_IMAGE",
        help="The image of sandboxes, by digest, or a prefix ending in / that all of them begin with.",
        show_default=False,
    ),
]
Engine = Annotated[str, typer.Option(help="The cluster's user that workers come as.")]
MaxSeconds = Annotated[int, typer.Option(min=60, help="No pod of a sandbox lives longer.")]
Pool = Annotated[
    str, typer.Option(metavar="KEY=VALUE", help="Label of the nodes for gVisor's sandboxes; empty: any node.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_POOL = ",".join(f"{key}={value}" for key, value in POOL.items())


@cluster.callback()
def _logs_elsewhere() -> None:
    """Standard output is the answer; what drivers log goes elsewhere."""
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))


@cluster.command()
def install(
    kubeconfig: Kubeconfig,
    image: Image,
    engine: Engine = ENGINE,
    max_seconds: MaxSeconds = MAX_S,
    pool: Pool = _POOL,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The API server judges it, and changes nothing.")] = False,
) -> None:
    """Apply what sandboxes need: admission policies, the engine's rights, runtime classes, priority, flow control.

    Server-side and idempotent: what is there already stays, what differs is put right. A second run is an upgrade.

    Status 0: applied; 2: bad usage; 3: the cluster refused, or cannot be reached.
    """
    choices = _choices(image, engine, max_seconds, pool)
    try:
        asked = Cluster.from_kubeconfig(kubeconfig, patience_s=_PATIENCE_S)
        for manifest in wanted(choices):
            if dry_run and manifest["metadata"].get("namespace") == "blastdoor-system":
                continue  # a dry run makes no namespace for it to be in
            asked.apply(manifest, dry_run=dry_run)
            typer.echo(f"{manifest['kind']} {manifest['metadata']['name']}")
    except ClusterError as error:
        raise _ended("the cluster was not made ready", error, kubeconfig) from error


@cluster.command("check")
def check_(
    kubeconfig: Kubeconfig,
    image: Image,
    engine: Engine = ENGINE,
    max_seconds: MaxSeconds = MAX_S,
    pool: Pool = _POOL,
    as_json: Json = False,
) -> None:
    """Say which defence is present, which is enforced (tried just now, and it held), and which is missing.

    With an image by digest a sandbox is made under runc and one under gVisor, since only a running pod shows whose
    kernel it has and that network policy is enforced. Without, nothing runs in the cluster.

    Status 0: all hold; 1: one does not; 2: bad usage; 3: the cluster cannot be asked.
    """
    choices = _choices(image, engine, max_seconds, pool)
    try:
        admin = Cluster.from_kubeconfig(kubeconfig, patience_s=_PATIENCE_S)
        engine_ = Cluster.from_kubeconfig(kubeconfig, patience_s=_PATIENCE_S, acting_as=choices.engine)
        rows = check(admin, engine_, choices)
        rows += _with_pods(admin, image, choices)
    except ClusterError as error:
        raise _ended("the cluster could not be checked", error, kubeconfig) from error
    if as_json:
        shown = [{"defence": row.defence, "state": str(row.state), "detail": row.detail} for row in rows]
        typer.echo(json.dumps({"defences": shown}))
    else:
        _show(rows)
    raise typer.Exit(0 if all(row.holds for row in rows) else 1)


@cluster.command("kubeconfig")
def kubeconfig_(
    kubeconfig: Kubeconfig,
    hours: Annotated[int, typer.Option(min=1, help="The cluster may grant less.")] = 24,
) -> None:
    """Print a kubeconfig for workers: the engine's, with a token that runs out.

    For a service account of blastdoor-system; with another kind of user, `install --engine`, you have its kubeconfig.
    """
    try:
        admin = Cluster.from_kubeconfig(kubeconfig, patience_s=_PATIENCE_S)
        typer.echo(json.dumps(engine_kubeconfig(admin, seconds=hours * 3600), indent=1))
    except ClusterError as error:
        raise _ended("no token for the engine", error, kubeconfig) from error


@cluster.command()
def image(
    rootfs: Annotated[
        Path, typer.Argument(help="A directory: the root file system that runs see.", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="REGISTRY/PATH of the image, without a tag.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The OCI archive to write.", show_default=False)],
) -> None:
    """Pack the image of sandboxes: a root file system, and our own first process in it. Prints its name by digest.

    That line is what BLASTDOOR_KUBE_IMAGE and `cluster install` take. Bring the archive to a registry (`skopeo copy
    oci-archive:FILE docker://NAME`) or to a node (`ctr -n k8s.io images import FILE`). The same tree, the same digest.

    Example:  blastdoor cluster image ./rootfs --name registry.example/blastdoor/run --output run.tar

    Status 0: written; 2: this cannot be an image, and a FILE that was there is as it was.
    """
    try:
        typer.echo(pack(rootfs, name, output))
    except (ImageRefused, OSError) as error:
        typer.echo(f"blastdoor: {error}", err=True)
        raise typer.Exit(2) from error


def engine_kubeconfig(admin: Cluster, *, seconds: int) -> dict[str, Any]:
    """JSON, which is YAML."""
    request = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"audiences": [], "expirationSeconds": seconds},
    }
    where = "/api/v1/namespaces/blastdoor-system/serviceaccounts/engine/token"
    token = admin.raw("POST", where, body=request).body["status"]["token"]
    server: dict[str, Any] = {"server": admin.server}
    if admin.authority is not None:
        server["certificate-authority-data"] = base64.b64encode(admin.authority).decode()
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "cluster", "cluster": server}],
        "users": [{"name": "engine", "user": {"token": token}}],
        "contexts": [{"name": "engine", "context": {"cluster": "cluster", "user": "engine"}}],
        "current-context": "engine",
    }


@dataclass(frozen=True)
class _Here:
    """A host for one probe (`service.core.boundary.Host`); the mark of what it makes is no installation's."""

    kubeconfig: Path
    kube_image: str
    installation: str
    site: str = "check"
    namespace_variants: Sequence[str] = ("runc", "gvisor")
    clusters: ClusterChoices = NO_CLUSTERS
    state_dir: Path = Path("/nonexistent")
    runtime_dir: Path = Path("/nonexistent")
    runsc: Path = Path("/nonexistent")


def _with_pods(admin: Cluster, image: str, choices: Choices) -> Iterator[Row]:
    """What the probe of the boundary finds, for which it comes as the engine."""
    if "@sha256:" not in image or choices.engine != ENGINE:
        yield Row("sandboxes", State.UNTRIED, "`blastdoor doctor`, as the engine and with the image, tries them")
        return
    with tempfile.TemporaryDirectory(prefix="blastdoor-") as folder:
        theirs = Path(folder) / "kubeconfig"
        theirs.write_text(json.dumps(engine_kubeconfig(admin, seconds=_PROBED_WITHIN_S)))
        boundary = load(BoundaryKind.NAMESPACE, _Here(theirs, image, f"check{secrets.token_hex(6)}"))
        try:
            for row in boundary.probe():
                said = "; ".join(row.missing) or "its kernel, network policy, PodSecurity, quota: as they must be"
                yield Row(f"sandboxes {row.boundary}", State.ENFORCED if row.available else State.INERT, said)
        finally:
            if isinstance(boundary, Warmable):
                boundary.close()


def _choices(image: str, engine: str, max_seconds: int, pool: str) -> Choices:
    name, at, digest = image.partition("@")
    try:
        if not name or not (image.endswith("/") or _DIGEST.fullmatch(digest)):
            raise ValueError(f"--image: {image!r}: should be NAME@sha256:DIGEST (64 hexadecimal digits), or end in /")
        return Choices(image_prefix=name + at, engine=engine, max_s=max_seconds, pool=_labels(pool))
    except ValueError as error:
        typer.echo(f"blastdoor: {error}", err=True)
        raise typer.Exit(2) from error


def _labels(text: str) -> Mapping[str, str]:
    if not text:
        return {}
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"--pool: {text!r}: should be KEY=VALUE, a label of the nodes, or empty for any node")
    return {key: value}


def _ended(what: str, error: ClusterError, kubeconfig: Path) -> typer.Exit:
    if isinstance(error, NoKubeconfig):
        typer.echo(f"blastdoor: --kubeconfig: {error}", err=True)
        return typer.Exit(2)
    silent = isinstance(error, Unreachable) and error.status == 0
    why = f"the API server that {kubeconfig} names does not answer: {error}" if silent else str(error)
    typer.echo(f"blastdoor: {what}: {why}", err=True)
    return typer.Exit(3)


def _show(rows: Sequence[Row]) -> None:
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("defence", "present", "enforced"):
        grid.add_column(title, no_wrap=True)
    grid.add_column("")
    for line in matrix(rows):
        grid.add_row(escape(line.defence), _coloured(line.present), _coloured(line.enforced), escape(line.detail))
    tried = sum(row.state is State.ENFORCED for row in rows)
    amiss = sum(not row.holds for row in rows)
    console = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    console.print(grid)
    console.print(
        f"\n{tried} enforced: tried just now, and held. {amiss or 'Nothing'} amiss.", style="red" if amiss else "green"
    )


def _coloured(state: State | None) -> str:
    return f"[{_COLOURS.get(state, 'red')}]{state}[/]" if state is not None else "-"
