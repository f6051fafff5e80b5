"""The node image as an engine's data folder that has nothing else in it: made once, shared by all engines.

An image takes ten seconds to load. So an engine imports it once, and what dockerd then has on disk is kept: its
records, which are small, each engine copies; the layer, which is not, each sees at its place by a read-only mount.
"""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster.engine import parts as recipes
from tests.cluster.engine import preload, rootfs
from tests.cluster.engine.outside import start
from tests.cluster.engine.place import Node
from tests.cluster.lab import images
from tests.cluster.lab.outside import ROOT
from tests.cluster.lab.parts import GVISOR, KUBERNETES, Parts, Say, cache, one_at_a_time

ENVIRONMENT = ("container=docker", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
CHANGES = (
    *(f"ENV {one}" for one in ENVIRONMENT),
    "STOPSIGNAL SIGRTMIN+3",
    'ENTRYPOINT [ "/usr/local/bin/entrypoint", "/sbin/init" ]',
    f"LABEL dev.blastdoor.runsc={GVISOR.split('-')[1][:8]}",
    "LABEL dev.blastdoor.node-image=1",  # it has what the product's Dockerfile puts there (cluster_templates/kind)
)
RECORDS = ("image", "overlay2")


def node(parts: Parts, say: Say) -> Node:
    """-> the node image, made when it is not in the cache."""
    version = f"{KUBERNETES}-{_recipe(parts)}"
    found = Node(f"blastdoor-kind-node:{version}", cache() / f"kind-node-{version}")
    if not found.folder.is_dir():
        with one_at_a_time("node-image"):
            if not found.folder.is_dir():
                _make(found, parts, say)
    return found


def _recipe(parts: Parts) -> str:
    """Changes with whatever the image is made of."""
    said = [*sorted(folder.name for folder in parts.folders.values()), repr((recipes.BASE, recipes.RELEASE, CHANGES))]
    for source in (rootfs.__file__, preload.__file__, images.__file__):
        said.append(Path(source).read_text())
    said += [(ROOT / "tests" / name).read_text() for name in rootfs.OWN_MODULES]
    said += [(rootfs.PRODUCT / name).read_text() for name in rootfs.POLICIES]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:8]


def _make(node: Node, parts: Parts, say: Say) -> None:
    for left in cache().glob(".kind-node-*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".kind-node-") as folder:
        scratch = Path(folder)
        root = scratch / "root"
        root.mkdir(mode=0o755)
        rootfs.write(root, parts, say)
        say("node image: into an engine")
        engine = start(scratch / "engine", parts, None, with_us=True)
        try:
            with subprocess.Popen(["tar", "--create", f"--directory={root}", "."], stdout=subprocess.PIPE) as packing:
                changes = [part for one in CHANGES for part in ("--change", one)]
                ask = [str(engine.docker), "import", *changes, "-", node.name]
                subprocess.run(ask, env=engine.environment, stdin=packing.stdout, check=True, capture_output=True)
            kept = scratch / "kept"
            kept.mkdir(mode=0o755)
            engine.quit()
            for name in RECORDS:
                (engine.state / "data" / name).rename(kept / name)
        finally:
            engine.end()
        kept.rename(node.folder)
