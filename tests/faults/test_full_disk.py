"""D48: the volume with the database and the blobs is full, and then it is not. No hand is needed in between."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.core.tenancy import KeyKind
from service.usecases.keys import mint
from tests.archives import tar, tar_member
from tests.faults.place import Forks, eventually, is_up
from tests.faults.scene import Scene, open_scene
from tests.servers import LOOPBACK, _free_port

VOLUME_BYTES = 8 * 2**20
PASSED = ("passed", None)

pytestmark = pytest.mark.timeout(180)


@contextmanager
def volume(directory: Path) -> Iterator[Path]:
    """A small file system of our own; gone afterwards whatever is still open on it."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={VOLUME_BYTES}", "blastdoor-test", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def fill(directory: Path) -> Path:
    """Every byte of it. -> the file to remove."""
    path = directory / "ballast"
    with path.open("wb", buffering=0) as file:
        for size in (65536, 512, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue
    return path


class Caller:
    """The tenant acme, over HTTP."""

    def __init__(self, scene: Scene, url: str, key: str) -> None:
        self._scene = scene
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=30)

    def post(self, *commands: list[str]) -> httpx.Response:
        """A run that brings 200 kB with it, and leaves the file `report`."""
        steps = [{"name": f"step {n}", "run": command} for n, command in enumerate(commands)]
        scenario = json.dumps({"name": "with a bundle", "steps": steps, "artifacts": ["report"]}).encode()
        bundle = tar(tar_member(b"data", os.urandom(200_000)))
        answer = self._http.post(
            "/v1/runs", files={"scenario": ("scenario.json", scenario), "bundle": ("bundle", bundle)}
        )
        if answer.status_code == 202:
            self._scene.recorder.add("accepted", run=answer.json()["id"], tenant="acme", key=None, token=None)
        return answer

    def submit(self, *commands: list[str]) -> str:
        answer = self.post(*commands)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def artifacts(self, run: str) -> list[bytes]:
        """Each that is listed, as it is served; what is served is what was said of it."""
        found = []
        for listed in self.get(f"/v1/runs/{run}").json()["artifacts"]:
            served = self.get(f"/v1/runs/{run}/artifacts/{listed['path']}")
            assert served.status_code == 200, served.text
            assert hashlib.sha256(served.content).hexdigest() == listed["sha256"].removeprefix("sha256:")
            found.append(served.content)
        return found

    def close(self) -> None:
        self._http.close()


def test_d48_a_full_volume_refuses_and_comes_back_by_itself(forks: Forks, tmp_path: Path) -> None:
    report = "r" * 40_000
    with (
        volume(tmp_path / "place" / "state") as state,
        open_scene(forks, tmp_path / "place", database=f"sqlite:///{state / 'blastdoor.db'}") as scene,
    ):
        place = scene.place
        key, port = mint(place.store, kind=KeyKind.TENANT, tenant="acme").key, _free_port()
        for role in ("relay", "reaper", "worker"):
            place.start(role)
        place.start("api", BLASTDOOR_PORT=str(port))
        url = f"http://{LOOPBACK}:{port}"
        eventually(lambda: is_up(url) and place.query("SELECT id FROM worker"), why=place.told)
        acme = Caller(scene, url, key)
        before = acme.submit(["write", "report", report])
        scene.until(before, "finished")
        assert acme.artifacts(before) == [report.encode()], "the control: while there is room it is accepted and served"
        under_way = acme.submit(["sleep", "2"], ["write", "report", report])
        scene.until(under_way, "running")

        ballast = fill(state)
        refused = acme.post(["true"])
        assert (refused.status_code, refused.json()["code"]) == (507, "storage_full"), refused.text
        assert acme.get(f"/v1/runs/{before}").json()["outcome"] == "passed", "what is there can be read"
        assert acme.artifacts(before) == [report.encode()]
        eventually(lambda: any("no room" in one.said() for one in place.programs), why=place.told)
        ballast.unlink()

        scene.until(under_way, "finished")
        after = acme.submit(["write", "report", report])
        assert scene.ended(after)[:2] == PASSED
        ended = scene.ended(under_way)[:2]
        assert ended in [PASSED, ("errored", "worker_lost"), ("errored", "internal")]
        assert acme.artifacts(under_way) in ([], [report.encode()]), "all of it or nothing"
        assert acme.artifacts(after) == [report.encode()]
        assert not list((state / "staging").iterdir()), "nothing half received is left"
        acme.close()
        assert scene.judged() == []
