"""Commands that touch this host. They join `blastdoor` by entry point, and need neither API nor database."""

import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NoReturn

import structlog
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.core.boundary import NO_CLUSTERS, BoundaryKind, Capabilities, ClusterChoices
from service.core.cleanup import ActionResult, PlannedAction, Scope
from service.core.errors import BlastdoorError
from service.core.placement import OFFERS
from workers.cluster_cli import cluster
from workers.conformance import report
from workers.conformance.corpus import CASES
from workers.conformance.run import Arena, Result, judge_all
from workers.conformance.stage import set_stage
from workers.environment import Told, WrongSetting, read_environment
from workers.registry import DRIVERS, Surrounded, Warmable, load
from workers.runtimes.import_rootfs import import_directory, import_oci_layout
from workers.runtimes.store import RuntimeStore

commands = typer.Typer(no_args_is_help=True)
runtimes = typer.Typer(no_args_is_help=True, help="Root filesystems that scenarios may name on this host.")
commands.add_typer(runtimes, name="runtimes")
commands.add_typer(cluster, name="cluster")


def default_state_dir() -> Path:
    """As `blastdoor up` has it (service.cli.address, which workers may not import): the XDG state home, if absolute."""
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if home.startswith("/") else Path.home() / ".local" / "state") / "blastdoor"


StateDir = Annotated[
    Path,
    typer.Option(
        "--state", envvar="BLASTDOOR_STATE_DIR", default_factory=default_state_dir, show_default=False,
        help="Where state lives [default: blastdoor in the XDG state home]",
    ),
]  # fmt: skip
RuntimeDir = Annotated[Path, typer.Option(envvar="BLASTDOOR_RUNTIME_DIR", help="Where live boundaries stand.")]
Runsc = Annotated[Path, typer.Option(envvar="BLASTDOOR_RUNSC", help="The gVisor runtime.")]
Kubeconfig = Annotated[
    Path | None, typer.Option(envvar="BLASTDOOR_KUBECONFIG", help="Of a cluster for boundary namespace.")
]
KubeImage = Annotated[str, typer.Option(envvar="BLASTDOOR_KUBE_IMAGE", help="The image of its pods, by digest.")]
NodeImage = Annotated[
    str | None, typer.Option(help="Of boundary cluster/kind, as the engine knows it; else BLASTDOOR_KIND_NODE_IMAGE.")
]
DockerHost = Annotated[str | None, typer.Option(help="The container engine's socket; else BLASTDOOR_DOCKER_HOST.")]
CapiKubeconfig = Annotated[
    Path | None, typer.Option(help="Of a management cluster of Cluster API; else BLASTDOOR_CAPI_KUBECONFIG.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]


@dataclass(frozen=True)
class ThisHost:
    """A host without an installation: what a probe makes carries a mark that no installation has."""

    state_dir: Path
    runtime_dir: Path
    runsc: Path
    installation: str
    site: str
    kubeconfig: Path | None = None
    kube_image: str = ""
    namespace_variants: Sequence[str] = ("runc", "gvisor")
    clusters: ClusterChoices = NO_CLUSTERS


@commands.command()
def doctor(
    state_dir: StateDir,
    runtime_dir: RuntimeDir = Path("/run/blastdoor"),
    runsc: Runsc = Path("/usr/bin/runsc"),
    kubeconfig: Kubeconfig = None,
    kube_image: KubeImage = "",
    node_image: NodeImage = None,
    docker_host: DockerHost = None,
    capi_kubeconfig: CapiKubeconfig = None,
    attack: Annotated[
        bool, typer.Option("--attack", help="Play every known attack in each, with its control.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say which boundaries this host can build, and for each that it cannot, why and how to get it.

    Every line was measured just now: for gVisor a real sandbox was started and asked. Of clusters it says what a worker
    with these variables would: all of .env.example that has to do with them are read.

    --attack (as root) plays the corpus of attacks in every boundary that can be built here, and prints case by
    boundary: blocked; vacuous, when the positive control did not fire and so nothing is shown; or FAILED. Status 0:
    all blocked. With --kubeconfig the pods of that cluster are attacked too, and a defence that it lacks is a failure;
    the image needs Python 3 as `python3`, in which the attacks are written.

    Examples:  blastdoor doctor    |    blastdoor doctor --json | jq '.boundaries[] | select(.available)'
    """
    # Standard output is the answer; what drivers log goes elsewhere.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    told = _told()
    clusters = _clusters(told.clusters, node_image=node_image, docker_host=docker_host, capi_kubeconfig=capi_kubeconfig)
    host = ThisHost(
        state_dir, runtime_dir, runsc, installation=f"doctor{os.getpid()}", site=socket.gethostname(),
        kubeconfig=kubeconfig, kube_image=kube_image, namespace_variants=told.namespace_variants,
        clusters=clusters,
    )  # fmt: skip
    if attack:
        _attack(host, as_json=as_json)
    try:
        rows = [row for kind in DRIVERS for row in _probed(kind, host)]
    finally:
        with suppress(FileNotFoundError):
            (runtime_dir / host.installation).rmdir()
    measured = {row.boundary for row in rows}
    undriven = [offer for offer in OFFERS if offer.boundary not in measured]
    rows += [
        Capabilities(boundary=offer.boundary, available=False, missing=(_no_driver(offer.kind),)) for offer in undriven
    ]
    if as_json:
        typer.echo(json.dumps({"boundaries": [row.model_dump(mode="json") for row in rows]}))
    else:
        _show(rows)
    raise typer.Exit(0 if any(row.available for row in rows) else 3)


def _told() -> Told:
    """Ends the command with 2 where no worker could start."""
    try:
        return read_environment()
    except WrongSetting as error:
        typer.echo(f"blastdoor: {error}", err=True)
        raise typer.Exit(2) from error


def _clusters(choices: ClusterChoices, **said: object) -> ClusterChoices:
    """As a worker with this environment makes them, but for what was said in its stead."""
    update = {name: value for name, value in said.items() if value is not None}
    if "capi_kubeconfig" in update:
        update["provisioners"] = tuple(dict.fromkeys((*choices.provisioners, "capi")))
    return choices.model_copy(update=update)


def _probed(kind: BoundaryKind, host: ThisHost) -> Sequence[Capabilities]:
    boundary = load(kind, host)
    try:
        return boundary.probe()
    finally:
        if isinstance(boundary, Warmable):
            boundary.close()


def _attack(host: ThisHost, *, as_json: bool) -> NoReturn:
    """Ends the command: 0 when everything was blocked, 2 without root, 3 when no boundary can be built, else 1.

    A cluster that was named is one to be judged: what it lacks is a hole, and not something that is not there."""
    if os.geteuid() != 0:
        typer.echo(
            "blastdoor: doctor --attack needs root: it builds real boundaries and looks at them from the host", err=True
        )
        raise typer.Exit(2)
    results: list[Result] = []
    not_built: dict[str, list[str]] = {}
    try:
        with set_stage() as stage:  # before any driver: what it starts would inherit the canaries
            for kind in DRIVERS:
                boundary = load(kind, host)
                try:
                    for row in boundary.probe():
                        if not row.available:
                            not_built[row.boundary] = list(row.missing)
                            continue
                        arena = Arena(
                            boundary, stage, name=row.boundary, installation=host.installation, site=host.site,
                            nearby=boundary.surroundings() if isinstance(boundary, Surrounded) else (),
                        )  # fmt: skip
                        results += judge_all(arena, CASES, progress=_say_progress)
                finally:
                    if isinstance(boundary, Warmable):
                        boundary.close()
    finally:
        with suppress(OSError):
            (host.runtime_dir / host.installation).rmdir()
    if as_json:
        typer.echo(json.dumps(report.document(results, not_built=not_built)))
    else:
        for name, missing in not_built.items():
            typer.echo(f"{name} cannot be built here: {'; '.join(missing)}")
        Console(soft_wrap=True).print(report.matrix(results))
    holes = host.kubeconfig is not None and any(name.startswith(BoundaryKind.NAMESPACE) for name in not_built)
    raise typer.Exit(1 if holes else 0 if report.held(results) else 1 if results else 3)


def _say_progress(result: Result) -> None:
    typer.echo(report.progress_line(result), err=True)


@commands.command("cleanup-local", hidden=True)
def cleanup_local(
    state_dir: StateDir,
    runtime_dir: RuntimeDir = Path("/run/blastdoor"),
    runsc: Runsc = Path("/usr/bin/runsc"),
    database: Annotated[str, typer.Option(envvar="BLASTDOOR_DATABASE_URL", help="SQLAlchemy URL.")] = "",
    installation: Annotated[str | None, typer.Option(help="Which one, when the database cannot say it.")] = None,
    tenant: Annotated[str | None, typer.Option()] = None,
    run: Annotated[str | None, typer.Option()] = None,
    boundary: Annotated[str | None, typer.Option()] = None,
    orphans: Annotated[bool, typer.Option("--orphans")] = False,
    older_than: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    apply: Annotated[bool, typer.Option("--apply")] = False,
    force: Annotated[bool, typer.Option("--force")] = False,
    as_json: Json = False,
    kubeconfig: Kubeconfig = None,
    kube_image: KubeImage = "",
    docker_host: DockerHost = None,
    capi_kubeconfig: CapiKubeconfig = None,
    site: Annotated[str, typer.Option(envvar="BLASTDOOR_SITE", help="As its workers call it; else the host.")] = "",
) -> None:
    """`blastdoor admin cleanup --local`: of this host, by the labels on it, while the API is down. Needs root.

    Status 0: done, or a dry run; 1: a line was refused or resists; 2: bad usage; 3: something could not be looked at.
    """
    from workers.local import NoInstallation, open_local  # a database, which no other command here needs

    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    age = None if older_than is None else timedelta(seconds=older_than)
    scope = Scope(tenant=tenant, run=run, boundary=boundary, orphans=orphans, older_than=age)
    if scope.is_empty:
        typer.echo("blastdoor: say which: --tenant, --run, --boundary, --older-than or --orphans", err=True)
        raise typer.Exit(2)
    try:
        local = open_local(
            state_dir=state_dir, runtime_dir=runtime_dir, runsc=runsc, site=site or socket.gethostname(),
            database_url=database, installation=installation, kubeconfig=kubeconfig, kube_image=kube_image,
            clusters=_clusters_here(
                state_dir, _clusters(_told().clusters, docker_host=docker_host, capi_kubeconfig=capi_kubeconfig)
            ),
        )  # fmt: skip
    except NoInstallation as error:
        typer.echo(f"blastdoor: {error}", err=True)
        raise typer.Exit(2) from error
    if local.unreachable is not None:
        said = "nobody can say what is live; only what has outlived its time is not taken to be"
        typer.echo(f"blastdoor: the database cannot be reached ({local.unreachable}): {said}", err=True)
    try:
        lines = local.plan(scope, force=force)
        lines = local.apply(lines) if apply else lines
    except (BlastdoorError, OSError) as error:
        typer.echo(f"blastdoor: this host could not be cleaned up: {error}", err=True)
        raise typer.Exit(3) from error
    finally:
        local.close()
    _show_lines(lines, local.installation, database=local.unreachable is None, applied=apply, as_json=as_json)
    for kind, why in local.unlisted.items():
        typer.echo(f"blastdoor: what there is of kind {kind} could not be listed: {why}", err=True)
    if local.unlisted:
        raise typer.Exit(3)
    raise typer.Exit(0 if not apply or all(line.result == ActionResult.DESTROYED for line in lines) else 1)


def _show_lines(
    lines: Sequence[PlannedAction], installation: str, *, database: bool, applied: bool, as_json: bool
) -> None:
    if as_json:
        shown = [
            {"ref": line.ref.model_dump(mode="json") | {"name": line.ref.name}} | line.model_dump(exclude={"ref"})
            for line in lines
        ]
        document = {"installation": installation, "database": database, "applied": applied, "actions": shown}
        typer.echo(json.dumps(document, default=str))
        return
    for line in lines:
        typer.echo(f"{line.ref.name}  {line.action}  {line.result or line.why}")
    if not lines:
        typer.echo("nothing here is in that scope")
    elif not applied:
        typer.echo("a dry run; --apply does it")


def _clusters_here(state_dir: Path, choices: ClusterChoices) -> ClusterChoices:
    """Only what this host has made clusters with: an engine that nobody uses need not answer."""
    made = ("kind",) if (state_dir / "clusters").is_dir() else ()
    there = ("capi",) if choices.capi_kubeconfig is not None else ()
    return choices.model_copy(update={"provisioners": (*made, *there)})


def _no_driver(kind: BoundaryKind) -> str:
    if kind in DRIVERS:
        said = "CLUSTER_PROVISIONERS" if kind is BoundaryKind.CLUSTER else "NAMESPACE_VARIANTS"
        return f"this host does not offer it (BLASTDOOR_{said} says what a worker offers)"
    return f"this version has no driver for {kind}"


def _show(rows: list[Capabilities]) -> None:
    promised = {offer.boundary: offer.guarantees for offer in OFFERS}
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        verdict, colour = ("yes", "green") if row.available else ("no", "dim")
        guarantees = row.guarantees or promised[row.boundary]
        notes = [f"kernel {guarantees.kernel}, nodes {guarantees.nodes}, control plane {guarantees.control_plane}"]
        notes += [f"{name} {version}" for name, version in sorted(row.versions.items())]
        notes += [f"advisory: {text}" for text in row.advisories]
        grid.add_row(
            row.boundary, f"[{colour}]{verdict}[/]", escape("\n".join(notes if row.available else row.missing))
        )
    Console().print(grid)


@runtimes.command("add")
def add_runtime(
    name: Annotated[str, typer.Argument(help="What scenarios call it: `runtime: NAME`.")],
    source: Annotated[Path, typer.Argument(metavar="DIR|OCI-LAYOUT", exists=True, file_okay=False, readable=True)],
    state_dir: StateDir,
    as_json: Json = False,
) -> None:
    """Copy a root filesystem into this host's store and offer it; a worker that runs offers it within moments.

    SOURCE is a directory with a root filesystem in it, or an OCI image layout (a directory with `oci-layout` and
    `index.json`). Regular files, directories and links are taken; a device node, FIFO or socket is refused.

    Examples:  blastdoor runtimes add alpine ./alpine-rootfs    |    blastdoor runtimes add node ./node-oci
    """
    store = RuntimeStore(state_dir / "runtimes")
    take = import_oci_layout if (source / "oci-layout").is_file() else import_directory
    try:
        added = take(store, name, source)
    except (BlastdoorError, OSError) as error:
        typer.echo(f"blastdoor: {name} was not added: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps({"name": added.name, "digest": added.digest}))
    else:
        typer.echo(f"{added.name}  {added.digest}")


@runtimes.command("list")
def list_runtimes(state_dir: StateDir, as_json: Json = False) -> None:
    """What scenarios may name on this host, by digest."""
    offered = RuntimeStore(state_dir / "runtimes").offered()
    if as_json:
        typer.echo(json.dumps({"runtimes": [{"name": name, "digest": digest} for name, digest in offered.items()]}))
        return
    for name, digest in offered.items():
        typer.echo(f"{name}  {digest}")
