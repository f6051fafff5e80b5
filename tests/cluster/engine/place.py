"""Where an engine keeps what."""

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

START_DOCKERD = signal.SIGUSR1
"""To the engine's first process."""


@dataclass(frozen=True)
class Place:
    """Below the engine's own folder; `volatile` is in memory and goes with its mount namespace."""

    state: Path

    @property
    def config(self) -> Path:
        return self.state / "config"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def programs(self) -> Path:
        return self.state / "programs"

    @property
    def volatile(self) -> Path:
        return self.state / "volatile"

    @property
    def data(self) -> Path:
        """dockerd's: images, containers and volumes, on disk."""
        return self.state / "data"

    @property
    def socket(self) -> Path:
        return self.state / "docker.sock"

    @property
    def processes(self) -> Path:
        """The ids of its processes, as they have them in there."""
        return self.state / "processes.json"

    @property
    def stopped(self) -> Path:
        """While it is there, dockerd may end and the rest goes on."""
        return self.state / "stopped"

    def make(self) -> None:
        for folder in (self.config, self.logs, self.programs, self.volatile, self.data):
            folder.mkdir(parents=True, mode=0o755)

    def layers(self) -> list[Path]:
        """The folders of image layers that are in the cache, and are to be seen in `data`."""
        listed = self.config / "layers.json"
        return [Path(one) for one in json.loads(listed.read_text())] if listed.is_file() else []


@dataclass(frozen=True)
class Node:
    """The node image, and the folder that keeps it."""

    name: str
    folder: Path

    def put(self, place: Place) -> None:
        """Gives it to an engine that is about to start."""
        layers = [path for path in (self.folder / "overlay2").iterdir() if (path / "diff").is_dir()]
        for path in layers:
            into = place.data / "overlay2" / path.name
            (into / "diff").mkdir(parents=True)
            for file in path.iterdir():
                if file.is_file():
                    shutil.copy2(file, into)
        shutil.copytree(self.folder / "overlay2/l", place.data / "overlay2/l", symlinks=True)
        shutil.copytree(self.folder / "image", place.data / "image")
        (place.config / "layers.json").write_text(json.dumps([str(path) for path in layers]))
