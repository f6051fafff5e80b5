"""What `blastdoor cluster image` packs is what pods are made of."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.lab.components import Place
from tests.cluster.lab.parts import Parts
from tests.cluster.namespaces import NamespaceKind, Site
from tests.sandboxes import Never, make_spec, shell
from workers.boundaries.namespace.driver import NamespaceBoundary

BLASTDOOR = Path(sys.executable).with_name("blastdoor")


@pytest.mark.parametrize("variant", ["runc", "gvisor"])
def test_a_pod_runs_on_an_image_that_the_command_packed(site: Site, tmp_path: Path, variant: str) -> None:
    if site.lab is None:
        pytest.skip("no node of this cluster takes an archive")
    busybox = Parts.read(Place(site.lab.state).config / "parts.json").program("busybox")
    (tmp_path / "rootfs/bin").mkdir(parents=True)
    (tmp_path / "rootfs/bin/busybox").write_bytes(busybox.read_bytes())
    (tmp_path / "rootfs/bin/busybox").chmod(0o755)
    for applet in ("sh", "cat"):
        (tmp_path / "rootfs/bin" / applet).symlink_to("busybox")
    (tmp_path / "rootfs/mine").write_text(f"packed for {variant}\n")

    packed = subprocess.run(
        [BLASTDOOR, "cluster", "image", "rootfs", "--name", "blastdoor.test/packed", "--output", "run.tar"],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    site.lab.load(tmp_path / "run.tar")

    boundary = NamespaceBoundary(replace(site.host(variant), image=packed.stdout.strip()))
    ref = NamespaceKind(boundary, variant).ref()
    try:
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            seen = sandbox.execute(shell("cat /mine; echo x > /mine || echo read-only"))
        assert seen.stdout.data.decode().splitlines() == [f"packed for {variant}", "read-only"]
    finally:
        boundary.destroy(ref)
        boundary.close()
