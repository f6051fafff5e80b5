"""The isolation policy of the gVisor boundary, as whole documents: read golden/gvisor_*.json in review."""

import json
import os
from pathlib import Path

from service.core.boundary import BoundarySpec
from service.core.controls import Limits, Network
from workers.boundaries.gvisor.render import group_limits, render_argv, render_config
from workers.runtimes.store import RootFilesystem

GOLDEN = Path(__file__).parent / "golden"
HOST_VIEW = RootFilesystem(
    name="default",
    digest="sha256:" + "0" * 64,
    path=Path("/store/default/rootfs"),
    binds=((Path("/usr"), Path("/usr")),),
    masks=(Path("/usr/local"),),
)
IMPORTED = RootFilesystem(name="python", digest="sha256:" + "1" * 64, path=Path("/store/python/rootfs"))
RUN = Path("/run/blastdoor/i/bd-0-f1")


def assert_golden(name: str, document: object) -> None:
    """WRITE_GOLDEN=1 writes it again; the difference is then for the reviewer."""
    text = json.dumps(document, indent=2) + "\n"
    path = GOLDEN / name
    if os.environ.get("WRITE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text(), f"{name} is not what is rendered"


def config(root: RootFilesystem, **limits: float) -> dict[str, object]:
    spec = BoundarySpec(limits=Limits.model_validate(limits), network=Network())
    return render_config(spec, root, init=Path("/opt/init"), work=RUN / "fs/work", tmp=RUN / "fs/tmp")


def test_the_configuration_of_the_host_view() -> None:
    assert_golden("gvisor_config_default.json", config(HOST_VIEW))


def test_the_configuration_of_an_imported_root_with_other_limits() -> None:
    assert_golden("gvisor_config_imported.json", config(IMPORTED, pids=16, open_files=64, disk=2**20))


def test_the_command() -> None:
    assert_golden("gvisor_argv.json", render_argv(Path("/usr/bin/runsc"), directfs=True))


def test_no_flag_that_opens_the_wall_is_ever_given() -> None:
    words = " ".join(render_argv(Path("/usr/bin/runsc"), directfs=False))
    for forbidden in ("allow-flag-override", "TESTONLY", "network=host", "host-uds=open", "profile", "detach", "debug"):
        assert forbidden not in words
    assert "--directfs=false" in words


def test_what_is_rendered_says_nothing_of_who_runs_what() -> None:
    text = json.dumps(config(HOST_VIEW))
    assert "tenant" not in text
    assert '"env": []' in text


def test_host_tasks_are_the_second_wall_behind_the_guests_own() -> None:
    limits = group_limits(BoundarySpec(limits=Limits(pids=100, memory=2**26, cpu=0.5), network=Network()))
    assert (limits.memory_bytes, limits.tasks, limits.cpus) == (2**26, 96 + 300, 0.5)
