"""The small parts of the gVisor boundary: capture, cgroup files of both versions, names, and collecting by hand."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sandboxes import Sink, artifact_limits, make_ref
from workers.boundaries.gvisor.cgroups import CgroupTree, Group, GroupLimits
from workers.boundaries.gvisor.collect import collect_tree
from workers.boundaries.gvisor.mounts import open_beneath
from workers.boundaries.gvisor.places import Places
from workers.capture import HeadAndTail
from workers.globs import Matcher


class TestCapture:
    @given(st.lists(st.binary(max_size=40), max_size=30), st.integers(min_value=1, max_value=64))
    def test_head_and_tail_are_the_streams_own(self, chunks: list[bytes], limit: int) -> None:
        kept = HeadAndTail(limit)
        for chunk in chunks:
            kept.add(chunk)
        whole, capture = b"".join(chunks), kept.capture()
        assert capture.total_bytes == len(whole)
        assert len(capture.data) == min(limit, len(whole))
        assert whole.startswith(capture.head)
        assert whole.endswith(capture.tail)
        assert capture.truncated == (len(whole) > limit)


V1_MOUNTS = """
30 25 0:26 / {root}/memory rw - cgroup cgroup rw,memory
31 25 0:27 / {root}/pids rw - cgroup cgroup rw,pids
32 25 0:28 / {root}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 25 0:29 / {root}/unified rw - cgroup2 cgroup2 rw
"""
V2_MOUNT = "30 25 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


class TestCgroups:
    def detect(self, tmp_path: Path, mounts: str) -> CgroupTree:
        listing = tmp_path / "mountinfo"
        listing.write_text(mounts.format(root=tmp_path / "cg").strip() + "\n")
        return CgroupTree.detect(mountinfo=listing)

    def test_version_1_beside_an_empty_unified_tree(self, tmp_path: Path) -> None:
        for name in ("memory", "pids", "cpu,cpuacct"):
            (tmp_path / "cg" / name).mkdir(parents=True)
        (tmp_path / "cg/memory/memory.memsw.limit_in_bytes").touch()
        tree = self.detect(tmp_path, V1_MOUNTS)
        assert (tree.version, tree.missing) == (1, ())
        assert len(tree.group("g").directories) == 3, "cpu and cpuacct share one hierarchy"

    def test_a_controller_that_is_not_mounted_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "cg/memory").mkdir(parents=True)
        (tmp_path / "cg/memory/memory.memsw.limit_in_bytes").touch()
        tree = self.detect(tmp_path, V1_MOUNTS.splitlines()[1])
        assert [name for name in ("pids", "cpu ", "cpuacct") if not any(name in m + " " for m in tree.missing)] == []

    def test_version_2_hands_its_controllers_down(self, tmp_path: Path) -> None:
        (tmp_path / "cg").mkdir()
        control = tmp_path / "cg/cgroup.subtree_control"
        control.write_text("memory pids cpu")
        assert self.detect(tmp_path, V2_MOUNT).missing == ()
        control.write_text("memory pids")
        assert self.detect(tmp_path, V2_MOUNT).version == 2
        assert control.read_text() == "+cpu"

    def test_version_2_without_a_right_to_hand_down_says_so(self, tmp_path: Path) -> None:
        missing = self.detect(tmp_path, V2_MOUNT).missing
        assert len(missing) == 3
        assert "memory" in missing[0]

    def test_limits_and_counters_of_version_2(self, tmp_path: Path) -> None:
        """The files as cgroup-v2.rst describes them; this machine may have none to try."""
        paths = dict.fromkeys(("memory", "pids", "cpu", "cpuacct"), tmp_path / "group")
        group = Group(version=2, paths=paths)
        group.create(GroupLimits(memory_bytes=2**26, tasks=100, cpus=0.25))
        files = {path.name: path.read_text() for path in (tmp_path / "group").iterdir()}
        assert files == {
            "memory.max": "67108864",
            "memory.swap.max": "0",
            "memory.oom.group": "1",
            "cpu.max": "25000 100000",
            "pids.max": "100",
        }
        assert group.limits() == {"memory_bytes": 2**26, "cpu": 0.25, "host_tasks": 100}
        (tmp_path / "group/cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
        (tmp_path / "group/memory.peak").write_text("67108864\n")
        (tmp_path / "group/memory.current").write_text("67000000\n")
        (tmp_path / "group/memory.stat").write_text("anon 1\nactive_file 0\ninactive_file 40000000\n")
        (tmp_path / "group/memory.events").write_text("low 0\noom 0\noom_kill 0\n")
        (tmp_path / "group/pids.events").write_text("max 0\n")
        assert (group.cpu_s(), group.peak_memory_bytes()) == (1.5, 2**26)
        assert (group.out_of_memory(), group.hit_host_task_limit()) == (False, False)
        assert not group.memory_is_full(2**26), "page cache can be reclaimed"
        (tmp_path / "group/memory.stat").write_text("anon 1\nactive_file 0\ninactive_file 0\n")
        (tmp_path / "group/memory.events").write_text("low 0\noom 1\noom_kill 1\n")
        (tmp_path / "group/pids.events").write_text("max 2\n")
        assert (group.out_of_memory(), group.hit_host_task_limit(), group.memory_is_full(2**26)) == (True, True, True)
        (tmp_path / "group/memory.max").write_text("max")
        (tmp_path / "group/cpu.max").write_text("max 100000")
        (tmp_path / "group/pids.max").write_text("max")
        assert group.limits() == {"memory_bytes": -1, "cpu": -1, "host_tasks": -1}, "no limit is not a large limit"


class TestPlaces:
    def test_only_a_boundarys_name_is_a_place(self, tmp_path: Path) -> None:
        places = Places(runtime_dir=tmp_path, installation="abc", site="here")
        for bad in ("../x", "bd-x-f1", "", "bd-" + "0" * 32, "bd-" + "0" * 32 + "-f1/.."):
            with pytest.raises(ValueError, match="no boundary's name"):
                places.place(bad)
        with pytest.raises(ValueError, match="installation"):
            Places(runtime_dir=tmp_path, installation="../x", site="here")

    def test_a_directory_without_its_label_is_still_found_and_has_a_minute_to_get_one(self, tmp_path: Path) -> None:
        places = Places(runtime_dir=tmp_path, installation="abc", site="here")
        ref = make_ref(installation="abc", fence=3)
        place = places.place(ref.name)
        place.make(ref)
        assert list(places.labels()) == [ref]
        (place.directory / "ref.json").write_text("{}")
        (found,) = places.labels()
        assert (found.name, found.run_id, found.fence, found.tenant) == (ref.name, ref.run_id, 3, "")
        assert found.expires_at < datetime.now(UTC) + timedelta(seconds=61), "it may just be getting its label"
        os.utime(place.directory, (0, 0))
        (found,) = places.labels()
        assert found.expires_at.year == 1970
        place.remove()
        place.remove()
        assert not place.exists

    def test_what_was_made_below_a_tmpfs_that_was_unmounted_meanwhile_is_removed_too(self, tmp_path: Path) -> None:
        places = Places(runtime_dir=tmp_path, installation="abc", site="here")
        place = places.place(make_ref(installation="abc").name)
        place.make(make_ref(installation="abc"))
        for part in ("work", "tmp"):
            (place.fs / part).mkdir()
        place.remove()
        assert not place.exists

    def test_what_is_not_ours_is_not_removed(self, tmp_path: Path) -> None:
        places = Places(runtime_dir=tmp_path, installation="abc", site="here")
        ref = make_ref(installation="abc")
        place = places.place(ref.name)
        place.make(ref)
        (place.directory / "somebody's").touch()
        with pytest.raises(OSError, match="not empty"):
            place.remove()
        (place.directory / "somebody's").unlink()
        place.remove()


class TestCollecting:
    @pytest.mark.parametrize(
        ("pattern", "path", "matches"),
        [
            ("report.xml", "report.xml", True),
            ("report.xml", "out/report.xml", False),
            ("*.xml", "report.xml", True),
            ("*.xml", "out/report.xml", False),
            ("out/*", "out/a", True),
            ("out/*", "out/a/b", False),
            ("out/**", "out/a/b", True),
            ("**/*.xml", "a/b/c.xml", True),
            ("**/*.xml", "c.xml", True),
            ("a/**/z", "a/z", True),
            ("a/**/z", "a/b/c/z", True),
            ("a/**/z", "a/b/c/zz", False),
            ("?.txt", "a.txt", True),
            ("?.txt", "ab.txt", False),
            ("[a]*", "[a]b", True),
            ("out/.*", "out/.hidden", True),
            ("*", "\udcff", True),
        ],
    )
    def test_patterns(self, pattern: str, path: str, matches: bool) -> None:
        assert Matcher([pattern]).matches(path) is matches

    def test_a_pattern_of_many_stars_costs_little(self) -> None:
        pattern = "/".join(["*a" * 100 + "b"] * 3)
        assert not Matcher([pattern, "**/" * 14 + "x"]).matches("/".join(["a" * 250] * 30))

    def test_nothing_is_opened_through_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside/secret").write_text("canary")
        root = tmp_path / "root"
        root.mkdir()
        (root / "link").symlink_to("../outside/secret")
        (root / "dir").symlink_to("../outside")
        (root / "inner").symlink_to("file")
        (root / "file").write_text("mine")
        root_fd = os.open(root, os.O_RDONLY)
        for path in ("link", "dir/secret", "../outside/secret", "inner", "/etc/passwd"):
            with pytest.raises(OSError, match=r"."):
                open_beneath(root_fd, path, os.O_RDONLY)
        os.close(open_beneath(root_fd, "file", os.O_RDONLY))
        os.close(root_fd)

    def test_caps_on_count_and_time_and_bytes(self, tmp_path: Path) -> None:
        for index in range(10):
            (tmp_path / f"f{index}").write_text("12345")
        root_fd = os.open(tmp_path, os.O_RDONLY)
        counted = collect_tree(root_fd, ["*"], limits=artifact_limits(count=3), sink=Sink())
        timed = collect_tree(root_fd, ["*"], limits=artifact_limits(seconds=-1.0, expected=("f1",)), sink=Sink())
        sized = collect_tree(root_fd, ["*"], limits=artifact_limits(total_bytes=12), sink=Sink())
        os.close(root_fd)
        assert (len(counted.kept), counted.skipped[0].why) == (3, "more than 3 artifacts")
        assert (len(timed.kept), timed.skipped[0].why.split(";")[0]) == (0, "out of time")
        assert timed.expected["f1"].absent_why == "out of time"
        assert [artifact.path for artifact in sized.kept] == ["f0", "f1"]
        assert len(sized.skipped) == 8
