"""D21 to D25 and D28 as a tenant submits them, with another tenant's run beside them: what a guest may see and touch.

Tokens are planted wherever they must not come from; the host looks for them in every byte that the tenant gets back.
Each control opens exactly one thing, within the wall, and the same look finds it there.
"""

import hashlib
import io
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.escape.whole_way import (
    Wire,
    attacked,
    everything_of,
    fingerprint,
    neighbour,
    new_token,
    program,
    said,
    work_of,
)
from tests.stack import Document, Stack, eventually, finished, submit
from tests.sweep import sweep
from workers.conformance import programs

pytestmark = pytest.mark.timeout(240)
HOST = (Path("/etc"), Path("/usr/bin"), Path("/usr/local/bin"), Path("/srv"), Path("/opt"))
KERNEL = ("kernel/hostname", "kernel/core_pattern", "vm/overcommit_memory", "net/ipv4/ip_forward")


@pytest.fixture
def host_file() -> Iterator[Path]:
    """A file that anybody on this host may read: only the wall is in the way."""
    directory = Path("/var/tmp") / f"bd-canary-{new_token()}"
    directory.mkdir(mode=0o755)
    path = directory / "canary"
    path.write_text(new_token())
    path.chmod(0o644)
    yield path
    path.unlink()
    directory.rmdir()


def settings() -> list[str]:
    return [Path("/proc/sys", name).read_text() for name in KERNEL]


class TestD21Proc:
    """The program prints only what has a token's form; what it reads besides is handed over as it stands."""

    KEEP = (
        "cat /proc/1/environ /proc/*/environ /proc/*/cmdline /proc/self/mountinfo /proc/net/tcp /proc/*/maps"
        " > seen 2>/dev/null; true"
    )

    def look(self, stack: Stack, *, token: str | None = None) -> tuple[Document, bytes]:
        run = attacked(stack, program(programs.SEARCH_PROC), ["sh", "-c", self.KEEP], token=token, artifacts=["seen"])
        assert [row["path"] for row in run["artifacts"]] == ["seen"], run
        return run, everything_of(stack.tenant, run)

    def test_no_token_of_the_worker_or_of_another_run_is_anywhere_in_proc(self, stack: Stack) -> None:
        with open(f"/proc/{stack.children['worker']}/environ") as environ:
            assert stack.token in environ.read(), "control: the worker's token is there to be found"
        with neighbour(stack) as beside:
            run, seen = self.look(stack)
        assert said(run, "FOUND") == []
        assert b"HOME=/work" in seen, "it did read what it may read"
        for token in (stack.token, beside.token, stack.installation):
            assert token.encode() not in seen

    def test_control_a_token_of_the_steps_own_is_found_in_proc(self, stack: Stack) -> None:
        token = new_token()
        run, seen = self.look(stack, token=token)
        assert token in " ".join(said(run, "FOUND"))
        assert token.encode() in seen


class TestD22Writing:
    NEW = (
        "/", "/etc", "/usr", "/usr/bin", "/usr/local/bin", "/var", "/var/tmp", "/home", "/root", "/run", "/dev", "/srv",
    )  # fmt: skip
    SETTINGS = (*(f"/proc/sys/{name}" for name in KERNEL), "/proc/sysrq-trigger", "/etc/passwd", "/usr/bin/env")

    def write(self, stack: Stack, mark: str, *more: str) -> list[str]:
        new = [f"{place.rstrip('/')}/{mark}" for place in (*self.NEW, *more)]
        return said(attacked(stack, program(programs.WRITE_PLACES, new=new, settings=self.SETTINGS)), "WROTE")

    def test_nothing_can_be_written_and_host_image_and_kernel_are_as_they_were(self, stack: Stack) -> None:
        mark, before = new_token(), (fingerprint(*HOST, stack.state / "runtimes"), settings())
        assert self.write(stack, mark) == []
        assert (fingerprint(*HOST, stack.state / "runtimes"), settings()) == before
        assert [place for place in self.NEW if Path(place, mark).exists()] == []

    def test_control_where_writing_is_allowed_it_is_seen(self, stack: Stack, tmp_path: Path) -> None:
        mark, before = new_token(), fingerprint(tmp_path)
        assert self.write(stack, mark, "/work") == [f"/work/{mark}"]
        (tmp_path / mark).write_text("was here")
        assert fingerprint(tmp_path) != before, "a new file changes the host's fingerprint"

    def test_what_was_uploaded_can_be_overwritten_inside_and_stays_as_it_was_with_us(self, stack: Stack) -> None:
        token, buffer = new_token(), io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            info = tarfile.TarInfo("input.txt")
            info.size = len(token)
            archive.addfile(info, io.BytesIO(token.encode()))
        bundle = buffer.getvalue()
        spoil = "cat input.txt; for f in input.txt; do echo spoiled > $f; done; cat input.txt"
        printed = [
            finished(stack.tenant, submit(stack.tenant, spoil, bundle=bundle))["steps"][0]["stdout"]["text"]
            for _ in range(2)
        ]
        assert printed == [f"{token}spoiled\n"] * 2, "control: inside, it was overwritten"
        kept = [path for path in (stack.state / "blobs").rglob("*") if path.is_file() and _holds(path, token)]
        assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in kept if path.stat().st_size > 1000] == [
            hashlib.sha256(bundle).hexdigest()
        ]


def _holds(path: Path, token: str) -> bool:
    return token.encode() in path.read_bytes()


class TestD23Processes:
    @staticmethod
    def play(stack: Stack, *, token: str | None = None) -> Document:
        look = {"run": program(programs.LOOK_FOR_MARK, mark="none", places=[]), "always": True}
        env = {"env": {"TOKEN": token}} if token else {}
        run = finished(stack.tenant, submit(stack.tenant, program(programs.REACH_PROCESSES), look, **env))
        assert programs.BEGUN in run["steps"][0]["stdout"]["text"]
        return run

    def test_no_other_process_can_be_traced_read_or_killed(self, stack: Stack) -> None:
        with stack.no_worker_dies(), neighbour(stack) as beside:
            run = self.play(stack)
            assert beside.token.encode() not in everything_of(stack.tenant, run)
        assert said(run, "ATTACHED") == []
        assert said(run, "FOUND") == []
        assert run["steps"][1]["outcome"] == "passed", "the sandbox's own init was killed"

    def test_control_a_child_of_its_own_can_be_read(self, stack: Stack) -> None:
        token = new_token()
        assert token in " ".join(said(self.play(stack, token=token), "FOUND"))


class TestD24Mounts:
    PLACES = ("/usr", "/etc", "/tmp", "/work")

    def play(self, stack: Stack, mark: str, *, private: bool) -> Document:
        mount = program(programs.MOUNT_OVER, mark=mark, places=self.PLACES, private=private)
        look = program(programs.LOOK_FOR_MARK, mark=mark, places=[*self.PLACES, "/usr/bin"])
        return attacked(stack, mount, look)

    def test_namespaces_and_mounts_of_its_own_reach_neither_the_next_step_nor_the_host(self, stack: Stack) -> None:
        mark = new_token()
        run = self.play(stack, mark, private=True)
        assert run["steps"][1]["outcome"] == "passed"
        assert said(run, "STANDS") == []
        assert sweep(mark) == []
        assert [str(found) for found in stack.left_of(run["id"])] == []

    def test_control_what_is_left_in_the_open_is_seen_by_the_next_step(self, stack: Stack) -> None:
        assert "/work" in said(self.play(stack, new_token(), private=False), "STANDS")


class TestD25Files:
    SOCKETS = (
        "/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/crio/crio.sock",
        "/run/podman/podman.sock", "/run/dbus/system_bus_socket", "/run/systemd/private",
    )  # fmt: skip
    DEVICES = tuple(f"/dev/{name}" for name in ("kvm", "mem", "kmsg", "sda", "vda", "nvme0n1", "vhost-net", "loop0"))
    TREES = ("/work", "/tmp", "/var", "/run", "/home", "/root", "/srv", "/opt", "/mnt", "/dev", "/etc", "/sys/fs")

    def search(self, stack: Stack, *files: Path, token: str | None = None) -> Document:
        return attacked(
            stack,
            program(
                programs.SEARCH_FILES, sockets=self.SOCKETS, devices=self.DEVICES, nodes=((1, 1), (8, 0), (10, 232)),
                files=[str(path) for path in files], trees=self.TREES,
            ),
            token=token,
        )  # fmt: skip

    def test_no_socket_device_file_of_the_host_or_work_of_another_run_is_there(
        self, stack: Stack, host_file: Path
    ) -> None:
        with neighbour(stack) as beside:
            secret = work_of(stack, beside.run_id) / "secret"
            assert beside.token in secret.read_text(), "control: it is there to be found, from the host"
            run = self.search(stack, host_file, secret, stack.state / "client.json")
            seen = everything_of(stack.tenant, run)
        assert said(run, "REACHED") + said(run, "OPENED") + said(run, "FOUND") == []
        for token in (beside.token, host_file.read_text(), stack.ready["tenant_key"]):
            assert token.encode() not in seen

    def test_control_a_file_with_a_token_in_its_own_work_is_found(self, stack: Stack) -> None:
        token = new_token()
        assert token in " ".join(said(self.search(stack, token=token), "FOUND"))


class TestD28Names:
    BACKWARDS = "import sys\nsys.argv[1] = sys.argv[1][::-1]\n"

    def resolve(self, stack: Stack, name: str, *targets: tuple[str, int]) -> Document:
        """What the attack is told crosses the loopback in our own upload, so it is told backwards."""
        *argv, told = program(self.BACKWARDS + programs.RESOLVE, name=name, targets=targets)
        return attacked(stack, [*argv, told[::-1]])

    def test_no_name_is_resolved_no_raw_socket_opens_and_no_packet_leaves(self, stack: Stack) -> None:
        token = new_token()
        with Wire().tapped() as wire, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns:
            dns.bind(("127.0.0.1", 0))
            dns.setblocking(False)
            targets = (dns.getsockname(), ("127.0.0.1", 53), ("::1", 53), ("192.0.2.53", 53))
            run = self.resolve(stack, f"{token}.canary.test", *targets)
            assert said(run, "RESOLVED") + said(run, "OPENED") == []
            assert wire.carrying(token) == 0
            with pytest.raises(BlockingIOError):
                dns.recv(2048)
            self.insist_that_the_host_is_heard(wire, dns)

    @staticmethod
    def insist_that_the_host_is_heard(wire: Wire, dns: socket.socket) -> None:
        """The control of the tap and of the listener: the same bytes, sent from this host to its own loopback."""
        token = new_token()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(f"{token}.canary.test".encode(), dns.getsockname())
        dns.settimeout(10)
        assert token.encode() in dns.recv(2048)
        assert eventually(lambda: wire.carrying(token), within_s=10), "the tap hears nothing"

    def test_control_a_name_that_the_guests_own_hosts_file_has_is_resolved(self, stack: Stack) -> None:
        assert said(self.resolve(stack, "localhost"), "RESOLVED")
