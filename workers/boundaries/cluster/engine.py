"""A container engine on this host, asked by its command `docker`: what exists, by label, and how to end it.

Each question is one short process with an environment of its own: no configuration, context or credential of whoever
runs the worker is in it. Nothing is pulled, ever.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.core.errors import BlastdoorError
from workers.proc import PATH_ONLY, ProcessFailed, run

KIND_CLUSTER = "io.x-k8s.kind.cluster"
"""The label that kind puts on each of its containers: the cluster's name."""
_ANSWER_S = 20.0
_REMOVE_S = 30.0
LOAD_S = 120.0
_MAX_OUTPUT = 4 * 2**20
_ABSENT = re.compile(r"Error response from daemon: (No such (container|object)|network \S+ not found)", re.IGNORECASE)
"""Not to be mixed up with a socket that is not found: then it is the engine that is absent."""


class EngineFailed(BlastdoorError):
    """The engine is away, or refused; the message says what it said."""

    code = "engine_failed"


@dataclass(frozen=True, kw_only=True)
class About:
    """The engine and the host under it."""

    version: str
    cgroup_v1: bool
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Image:
    """`id` is `sha256:` and its digest: by it nothing can be pulled, and nothing else be meant."""

    id: str
    labels: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Network:
    id: str
    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Container:
    """Of kind's: `cluster` is what kind calls it, `network` the name of the one that it was made for, which it keeps
    when that is gone."""

    id: str
    cluster: str
    network: str


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`host`: as in DOCKER_HOST. `home`: an empty directory, for programs that look for their settings at home."""

    docker: Path
    host: str
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """For `docker`, and for what finds `docker` on its path."""
        return {
            "PATH": f"{self.docker.parent}:{PATH_ONLY['PATH']}",
            "DOCKER_HOST": self.host,
            "DOCKER_CONFIG": str(self.home),
            "HOME": str(self.home),
            "LC_ALL": "C",
        }

    def about(self, *, within_s: float | None = None) -> About:
        """Raises EngineFailed."""
        said = self._ask("info", "--format={{json .}}", within_s=within_s)
        try:
            found = json.loads(said)
            if errors := found.get("ServerErrors"):
                raise EngineFailed(f"the engine at {self.host} does not answer: {'; '.join(errors)}")
            version, cgroups, memory = found["ServerVersion"], found["CgroupVersion"], found["MemTotal"]
        except (ValueError, KeyError) as error:
            raise EngineFailed(f"the engine at {self.host} did not say what it is") from error
        return About(version=str(version), cgroup_v1=cgroups == "1", memory_bytes=int(memory))

    def image(self, name: str, *, within_s: float | None = None) -> Image | None:
        """-> None when the engine does not have it. Raises EngineFailed."""
        try:
            (found,) = json.loads(self._ask("image", "inspect", name, within_s=within_s))
        except EngineFailed as error:
            if "no such image" in error.detail.lower():
                return None
            raise
        return Image(id=found["Id"], labels=(found.get("Config") or {}).get("Labels") or {})

    def networks(self, *, labels: Mapping[str, str], read: Sequence[str]) -> list[Network]:
        """Those that carry all of `labels`; of each the labels named in `read`. Raises EngineFailed."""
        filters = [f"--filter=label={name}={value}" for name, value in labels.items()]
        columns = "\t".join(["{{.ID}}", "{{.Name}}", *(f'{{{{.Label "{name}"}}}}' for name in read)])
        said = self._ask("network", "ls", "--no-trunc", *filters, f"--format={columns}")
        rows = [line.split("\t") for line in said.splitlines()]
        return [Network(id=row[0], name=row[1], labels=dict(zip(read, row[2:], strict=True))) for row in rows]

    def has_network(self, name: str) -> bool:
        """Raises EngineFailed."""
        said = self._ask("network", "ls", f"--filter=name=^{name}$", "--format={{.Name}}")
        return name in said.splitlines()

    def create_network(self, name: str, *, labels: Mapping[str, str], options: Sequence[str]) -> None:
        """Raises EngineFailed, also when the name is taken."""
        words = [f"--label={key}={value}" for key, value in labels.items()]
        words += [f"--opt={option}" for option in options]
        self._ask("network", "create", "--driver=bridge", *words, name)

    def remove_network(self, name: str) -> None:
        """Absent is success. Raises EngineFailed, above all while a container is in it."""
        self._end("network", "rm", name)

    def containers(self) -> list[Container]:
        """All of kind's, stopped ones too. Raises EngineFailed."""
        ids = self._ask("ps", "--all", "--no-trunc", "--quiet", f"--filter=label={KIND_CLUSTER}").split()
        cluster = f'{{{{index .Config.Labels "{KIND_CLUSTER}"}}}}'
        columns = "\t".join(["{{.Id}}", cluster, "{{.HostConfig.NetworkMode}}"])
        said = self._ask("inspect", "--type=container", f"--format={columns}", *ids, some_absent=True) if ids else ""
        rows = [line.split("\t") for line in said.splitlines() if line]
        return [Container(id=id_, cluster=name, network=network) for id_, name, network in rows]

    def load(self, container: str, archive: Path) -> None:
        """An OCI archive into containerd of a node, whose container this is. Raises EngineFailed."""
        there = "/blastdoor-images.tar"
        self._ask("cp", str(archive), f"{container}:{there}", within_s=LOAD_S)
        self._ask("exec", container, "ctr", "--namespace=k8s.io", "images", "import", there, within_s=LOAD_S)
        self._ask("exec", container, "rm", there)

    def execute(self, container: str, argv: Sequence[str]) -> None:
        """Raises EngineFailed, also when the program fails."""
        self._ask("exec", container, *argv)

    def limit(self, container: str, limits: Sequence[str]) -> None:
        """Raises EngineFailed."""
        self._ask("update", *limits, container)

    def remove_container(self, container: str) -> None:
        """With the volumes that were made for it. Absent is success. Raises EngineFailed."""
        self._end("rm", "--force", "--volumes", container)

    def _end(self, *words: str) -> None:
        try:
            self._ask(*words, within_s=_REMOVE_S)
        except EngineFailed as error:
            if not _ABSENT.search(error.detail):
                raise

    def _ask(self, *words: str, within_s: float | None = None, some_absent: bool = False) -> str:
        """-> what it printed. `some_absent`: of several things asked for, some may be gone. Raises EngineFailed."""
        try:
            ended = run(
                [str(self.docker), *words], env=self.environment, timeout_s=within_s or _ANSWER_S,
                max_output=_MAX_OUTPUT, cwd=Path("/"),
            )  # fmt: skip
        except ProcessFailed as error:
            raise EngineFailed(f"the engine at {self.host}: {error.detail}") from error
        if ended.status != 0:
            said = ended.stderr.decode("utf-8", "replace").strip() or f"status {ended.status}"
            if not (some_absent and all(map(_ABSENT.search, said.splitlines()))):
                raise EngineFailed(f"the engine at {self.host}: {said[-500:]}")
        if ended.truncated:
            raise EngineFailed(f"the engine at {self.host} said more than {_MAX_OUTPUT} bytes")
        return ended.text
