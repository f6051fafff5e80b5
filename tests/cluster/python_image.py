"""The image of sandboxes for tests with this machine's Python in it, in which the corpus of attacks is written."""

import json
import re
import subprocess
from pathlib import Path

from tests.cluster.lab.components import Place
from tests.cluster.lab.outside import Lab
from tests.cluster.lab.parts import Parts
from tests.cluster.runtime_image import write_runtime

PYTHON = Path("/usr/bin/python3")
_LOOK = "import json, sys, sysconfig; print(json.dumps([sys.executable, sysconfig.get_path('stdlib')]))"
_LEFT_OUT = re.compile(
    r"/(config-3[^/]*|test|tests|idlelib|tkinter|lib2to3|ensurepip|pydoc_data|site-packages|dist-packages)/"
)
_EXTENSIONS = ("_ctypes", "_ssl")
"""Those of which the programs need the libraries."""


def load_python(lab: Lab, archive: Path) -> str:
    """-> the image's name on the lab's node."""
    busybox = Path(Parts.read(Place(lab.state).config / "parts.json").program("busybox"))
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    image = write_runtime(archive, busybox, applets, more=python_files() | {"usr/bin/env": busybox})
    lab.load(archive)
    return image


def python_files() -> dict[str, Path]:
    """Path in the image to the file here: the interpreter, its library, and what these are linked with."""
    said = subprocess.run([PYTHON, "-I", "-S", "-c", _LOOK], capture_output=True, text=True, check=True).stdout
    program, library = (Path(path) for path in json.loads(said))
    found = [path for path in sorted(library.rglob("*")) if path.is_file() and not _LEFT_OUT.search(str(path))]
    linked = [program.resolve(), *(path for path in found if path.name.startswith(_EXTENSIONS))]
    files = {str(path): path for path in found}
    for path in linked:
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        files |= {name: Path(name) for name in re.findall(r"(/\S+) \(0x", listed)}
    files["/usr/bin/python3"] = program.resolve()
    return {name.lstrip("/"): path.resolve() for name, path in files.items()}
