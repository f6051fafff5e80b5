"""D31 to D36 as a tenant submits them: what a guest leaves, prints and claims. It is handed over as bytes, judged by
the exit status and the expectations alone, and reaches no terminal, log, event or parser of ours but as data.
"""

import hashlib
import json
import os
import pty
import subprocess
import sys
import unicodedata
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.escape.whole_way import (
    artifact,
    attacked,
    events_of,
    everything_of,
    insist_on_harmless_headers,
    new_token,
    program,
)
from tests.stack import Document, Stack, eventually, finished, python, submit
from workers.conformance import programs

MIB = 2**20
pytestmark = pytest.mark.timeout(240)


class TestD31Links:
    """FIFOs and sockets that a guest makes exist within gVisor only (`--host-fifo=none`, `--host-uds=none`): nothing of
    them stands in the directory that is collected. The collector that does meet them is in test_gvisor_wall.py."""

    BAIT = ("link", "environ", "pipe", "socket", "hard", "passwd")
    COLLECTED_WITHIN_S = 5.0

    def plant(self, stack: Stack, file: Path, *, token: str | None = None) -> Document:
        planting = program(programs.PLANT, file=str(file), names=self.BAIT)
        return attacked(stack, planting, token=token, artifacts=["out/**"])

    def test_links_and_special_files_are_skipped_and_said_and_collecting_is_quick(
        self, stack: Stack, tmp_path: Path
    ) -> None:
        host_file = tmp_path / "canary"
        host_file.write_text(new_token())
        run = self.plant(stack, host_file)
        assert (run["outcome"], run["artifacts"]) == ("passed", [])
        why = {row["path"]: row["why"] for row in run["skipped_artifacts"]}
        links = dict.fromkeys(("out/link", "out/directory", "out/root", "out/environ"), "symlink")
        special = {"out/pipe": "fifo", "out/socket": "socket"}
        assert why.items() <= (links | special | dict.fromkeys(("out/hard", "out/d/one"), "hard link")).items()
        assert why.keys() >= {*links, "out/hard", "out/d/one"}
        seen = everything_of(stack.tenant, run)
        assert host_file.read_bytes() not in seen
        assert b"root:x:0:0" not in seen
        assert self.collecting_s(stack, run["id"]) < self.COLLECTED_WITHIN_S
        for path in why:
            assert stack.tenant.get(f"/v1/runs/{run['id']}/artifacts/{path}").status_code == 404

    @staticmethod
    def collecting_s(stack: Stack, run_id: str) -> float:
        def times() -> dict[str, datetime]:
            rows = events_of(stack, run_id)
            return {row["type"].rpartition(".")[2]: datetime.fromisoformat(row["time"]) for row in rows}

        told: dict[str, datetime] = eventually(lambda: found if "finished" in (found := times()) else None)
        return (told["finished"] - told["collecting"]).total_seconds()

    def test_control_regular_files_of_these_names_are_kept(self, stack: Stack, tmp_path: Path) -> None:
        token = new_token()
        run = self.plant(stack, tmp_path / "canary", token=token)
        assert {row["path"] for row in run["artifacts"]} == {f"out/{name}" for name in self.BAIT}
        assert token.encode() in everything_of(stack.tenant, run)


class TestD32ForgedReports:
    REPORT = (
        '<?xml version="1.0"?><testsuites><testsuite name="all" tests="1" failures="0" errors="0">'
        '<testcase name="everything"/></testsuite></testsuites>'
    )
    RESULT = json.dumps({"phase": "finished", "outcome": "passed", "reason": None, "exit_code": 0})

    def report(self, stack: Stack, exit_code: int) -> Document:
        write = f"open('junit.xml', 'w').write({self.REPORT!r}); open('result.json', 'w').write({self.RESULT!r})"
        forge = f"import sys; {write}; print({self.RESULT!r}); sys.exit({exit_code})"
        return finished(stack.tenant, submit(stack.tenant, python(forge), artifacts=["*"]))

    def test_a_perfect_report_beside_exit_1_is_failed_and_the_report_an_artifact(self, stack: Stack) -> None:
        run = self.report(stack, 1)
        assert (run["outcome"], run["reason"]) == ("failed", "exit_code")
        assert (run["steps"][0]["outcome"], run["steps"][0]["exit_code"]) == ("failed", 1)
        assert [row["path"] for row in run["artifacts"]] == ["junit.xml", "result.json"]
        answer = artifact(stack.tenant, run["id"], "junit.xml")
        assert answer.text == self.REPORT
        insist_on_harmless_headers(answer)

    def test_control_the_same_report_beside_exit_0_passes(self, stack: Stack) -> None:
        assert self.report(stack, 0)["outcome"] == "passed"


class TestD33EarlyExit:
    def exit_(self, stack: Stack, *, honest: bool) -> Document:
        step = {
            "run": program(programs.EXIT_EARLY, honest=honest),
            "expect": {"stdout": {"contains": "42 tests passed"}},
        }
        return finished(stack.tenant, submit(stack.tenant, step))

    def test_exit_0_before_the_tests_have_run_is_failed_by_the_expectation(self, stack: Stack) -> None:
        run = self.exit_(stack, honest=False)
        assert (run["outcome"], run["reason"]) == ("failed", "expectation")
        assert run["steps"][0]["exit_code"] == 0
        assert [failure["expectation"] for failure in run["steps"][0]["failures"]] == ["stdout.contains"]

    def test_control_when_the_tests_do_run_it_passes(self, stack: Stack) -> None:
        assert self.exit_(stack, honest=True)["outcome"] == "passed"


HOSTILE = (
    b"plain\n\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b]52;c;ZXZpbA==\x07\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\\n"
    b"rm -rf /\rharmless\n\x07\x9b2J\xc2\x9b2J\n"
    + "\u202etxt.exe\u202c \u2066x\u2069 \u200b\ufeff\n".encode()
    + b"\xff\xfe\x00end\n"
)


def obeyed(shown: bytes) -> set[str]:
    """What of these bytes a terminal would act upon, by Unicode's own classes; newlines and tabs are harmless."""
    text = shown.decode("utf-8", "surrogateescape").replace("\r\n", "\n")  # a terminal's driver makes these
    risky = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return {f"U+{ord(c):04X}" for c in text if c not in "\n\t" and unicodedata.category(c) in risky}


class TestD34Terminals:
    @pytest.fixture
    def run(self, stack: Stack) -> Document:
        hostile = f"import sys; sys.stdout.buffer.write({HOSTILE!r}); sys.stderr.buffer.write({HOSTILE!r}); sys.exit(1)"
        return finished(stack.tenant, submit(stack.tenant, python(hostile), name="hostile output"))

    @staticmethod
    def command(stack: Stack, *words: str, terminal: bool = False) -> bytes:
        """What `blastdoor ...` writes, to a pipe or to a terminal."""
        argv = [sys.executable, "-I", "-m", "service.cli.main", *words]
        given = {"BLASTDOOR_URL": stack.ready["url"], "BLASTDOOR_KEY": stack.ready["tenant_key"]}
        env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TERM": "xterm", "NO_COLOR": "1"} | given
        if not terminal:
            return subprocess.run(argv, env=env, capture_output=True, check=False, timeout=60).stdout
        ours, theirs = pty.openpty()
        with subprocess.Popen(argv, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            shown = b""
            try:
                while piece := os.read(ours, 65536):
                    shown += piece
            except OSError:  # EIO: the other end is closed
                pass
            finally:
                os.close(ours)
            process.wait(60)
        return shown

    def test_the_bytes_are_stored_intact_and_no_view_hands_them_to_a_terminal(
        self, stack: Stack, run: Document
    ) -> None:
        assert run["outcome"] == "failed"
        for stream in ("stdout", "stderr"):
            answer = stack.tenant.get(f"/v1/runs/{run['id']}/steps/1/{stream}")
            assert answer.content == HOSTILE
            insist_on_harmless_headers(answer)
        views = {
            "show": self.command(stack, "runs", "show", run["id"]),
            "show --json": self.command(stack, "runs", "show", run["id"], "--json"),
            "output, on a terminal": self.command(stack, "runs", "output", run["id"], "1", terminal=True),
            "list": self.command(stack, "runs"),
        }
        assert {name: obeyed(view) for name, view in views.items() if obeyed(view)} == {}
        for name in ("show", "output, on a terminal"):
            assert b"\\x1b]52;c;" in views[name], "it is shown, spelled out"
            assert rb"\u202etxt.exe" in views[name]

    def test_control_into_a_pipe_the_bytes_go_as_they_are_and_the_same_look_finds_them(
        self, stack: Stack, run: Document
    ) -> None:
        raw = self.command(stack, "runs", "output", run["id"], "1")
        assert raw == HOSTILE
        assert {"U+001B", "U+0007", "U+000D", "U+202E", "U+009B", "U+FEFF"} <= obeyed(raw)


class TestD35ForgedRecords:
    """A log line of ours is one JSON object; the guest prints some that look the same, and our own words."""

    MARK = "forged-by-the-guest"

    def lines(self, run_id: str) -> str:
        event = {
            "specversion": "1.0", "id": self.MARK, "source": "blastdoor", "type": "dev.blastdoor.run.finished",
            "subject": run_id, "tenant": "demo", "data": {"outcome": "passed"},
        }  # fmt: skip
        log = {"event": self.MARK, "level": "critical", "program": "api", "timestamp": "2026-01-01T00:00:00Z"}
        return "\n".join([
            json.dumps(event), json.dumps(log), f"::set-env name=OUTCOME::{self.MARK}", f"::error::{self.MARK}",
            "--- end of step 1 ---", '{"exit_code": 0}', programs.ENDED,
        ])  # fmt: skip

    def test_what_a_guest_prints_makes_no_event_no_log_record_and_no_outcome(self, stack: Stack) -> None:
        forged = self.lines("run_" + "0" * 32)
        many = f"{forged}\nevent: result\ndata: {{}}\n\n"
        run_id = submit(
            stack.tenant, python(f"import sys; print({many!r}); print({many!r}, file=sys.stderr); sys.exit(1)"),
            metadata={"note": f"\n{forged}\n"}, artifacts=["*"],
        )  # fmt: skip
        run = finished(stack.tenant, run_id)
        assert (run["outcome"], run["reason"]) == ("failed", "exit_code")
        assert run["steps"][0]["stdout"]["text"] == f"{many}\n"
        types = eventually(lambda: found if len(found := _types(stack, run_id)) == 6 else None)
        assert types == ["queued", "provisioning", "running", "collecting", "finished", "destroyed"]
        assert [event for event in events_of(stack) if event["id"] == self.MARK] == []
        others = [event for event in events_of(stack) if event["subject"] != run_id]
        assert self.MARK not in json.dumps(others)
        logs = stack.state / "logs"
        assert any("sandbox_ended" in path.read_text() for path in logs.glob("*.log")), "there is something to look at"
        assert self.forgeries(logs) == []

    def forgeries(self, directory: Path) -> list[str]:
        """Lines of our logs that somebody else has written: a record that is none of ours, or the mark outside of the
        values of a record. What a server or a library of ours prints when it starts is a line without it."""
        found = []
        for path in sorted(directory.glob("*.log")):
            for line in path.read_text("utf-8", "replace").split("\n"):
                try:
                    record = json.loads(line)
                    forged = record["event"] == self.MARK or record["level"] == "critical"
                except (ValueError, TypeError, KeyError):
                    forged = self.MARK in line
                found += [f"{path.name}: {line}"] * forged
        return found

    def test_control_such_a_record_or_line_in_a_log_would_be_found(self, tmp_path: Path) -> None:
        for line in self.lines("x").split("\n")[:4]:
            (tmp_path / "api.log").write_text(f'{{"event": "request", "level": "info"}}\n{line}\n')
            assert len(self.forgeries(tmp_path)) == 1, line
        (tmp_path / "api.log").write_text(json.dumps({"event": "request", "level": "info", "said": self.lines("x")}))
        assert self.forgeries(tmp_path) == [], "as a value it is data"


def _types(stack: Stack, run_id: str) -> list[str]:
    return [event["type"].rpartition(".")[2] for event in events_of(stack, run_id)]


class TestD36Xml:
    BOMB = (
        '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "{}">'.format("ha" * 50)
        + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        + "]><a>&{};</a>"
    )
    OUTSIDE = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>'
    ILLEGAL = b"]]>\x00\x01\x0b\xed\xa0\x80\xff<failure message='&bogus;'/>"
    LARGE = 50 * MIB

    def test_bombs_and_large_documents_are_bytes_that_nobody_of_ours_parses(self, stack: Stack) -> None:
        small = {
            "bomb.xml": self.BOMB.format("i").encode(),
            "outside.xml": self.OUTSIDE.encode(),
            "bad.xml": self.ILLEGAL,
        }
        write = f"import sys\nfor name, data in {small!r}.items(): open('out/' + name, 'wb').write(data)\n"
        write += f"open('out/large.xml', 'wb').write(b'<a>' + b'<b></b>' * ({self.LARGE} // 7) + b'</a>')\n"
        write += f"sys.stdout.buffer.write({self.ILLEGAL!r})"
        api, before = stack.children["api"], rss_bytes(stack.children["api"])
        run = finished(
            stack.tenant,
            submit(
                stack.tenant, "mkdir out", python(write), artifacts=["out/*"],
                limits={"artifacts": "64MiB", "disk": "128MiB", "memory": "512MiB"},
            ),
        )  # fmt: skip
        assert (run["outcome"], run["skipped_artifacts"]) == ("passed", [])
        rows = {row["path"].removeprefix("out/"): row for row in run["artifacts"]}
        assert set(rows) == {*small, "large.xml"}
        digest, size, highest = hashlib.sha256(), 0, 0
        with stack.tenant.stream("GET", f"/v1/runs/{run['id']}/artifacts/out/large.xml") as answer:
            insist_on_harmless_headers(answer)  # type: ignore[arg-type]
            for piece in answer.iter_bytes():
                digest.update(piece)
                size += len(piece)
                highest = max(highest, rss_bytes(api))
        assert (size, digest.hexdigest()) == (rows["large.xml"]["bytes"], rows["large.xml"]["sha256"])
        assert size > self.LARGE - 10
        for name, data in small.items():
            served = artifact(stack.tenant, run["id"], f"out/{name}")
            assert served.content == data
            insist_on_harmless_headers(served)
        assert stack.tenant.get(f"/v1/runs/{run['id']}/steps/2/stdout").content == self.ILLEGAL
        assert rss_bytes(api) - before < 32 * MIB
        assert highest - before < 32 * MIB, "the API's resident memory grows with what it serves"

    def test_control_a_parser_would_have_expanded_the_bomb_and_memory_would_show_it(self) -> None:
        """At a depth at which that does no harm."""
        text = ElementTree.fromstring(self.BOMB.format("d")).text
        assert text is not None
        assert len(text) == 100 * 10**3
        before = rss_bytes(os.getpid())
        held = b"x" * (64 * MIB)
        assert rss_bytes(os.getpid()) - before > 32 * MIB
        assert len(held) == 64 * MIB


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
