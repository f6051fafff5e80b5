"""An operator at work on a real `blastdoor up`: sees what stands, is refused, insists, and finds it in the log."""

import json
import os
import subprocess
from typing import Any

import pytest

from tests.e2e.test_commands import BLASTDOOR, blastdoor
from tests.stack import Stack, eventually, finished, started, submit

pytestmark = pytest.mark.timeout(180)


def admin(stack: Stack, *arguments: str, status: int = 0) -> Any:
    code, out, errors = blastdoor(stack, "admin", *arguments, "--json")
    assert code == status, (out, errors)
    return json.loads(out)


def shown(stack: Stack, run_id: str) -> list[dict[str, Any]]:
    return [row for row in admin(stack, "boundaries")["items"] if row["run"] == run_id]


def test_a_live_boundary_is_seen_refused_and_with_force_ended_as_the_operators_doing(stack: Stack) -> None:
    run_id = submit(stack.tenant, "touch here; sleep 60")
    started(stack.tenant, run_id)
    stack.wait_for_file(run_id, "here")
    (row,) = eventually(lambda: shown(stack, run_id))
    assert (row["state"], row["tenant"], row["kind"], row["fence"]) == ("live", "demo", "gvisor", 1)

    dry = admin(stack, "cleanup", "--run", run_id, "--tenant", "demo", "--force")
    assert [(line["action"], line["result"]) for line in dry["actions"]] == [("kill", None)]
    refused = admin(stack, "cleanup", "--run", run_id, "--apply", status=1)
    assert [(line["action"], line["result"]) for line in refused["actions"]] == [("refuse", "refused")]
    assert stack.group(run_id).pids(), "it plays on"

    done = admin(stack, "cleanup", "--plan", dry["id"], "--apply")

    assert [(line["ref"]["run"], line["result"]) for line in done["actions"]] == [(run_id, "destroyed")]
    run = finished(stack.tenant, run_id)
    assert (run["outcome"], run["reason"]) == ("cancelled", "cancelled_by_operator")
    assert stack.left_of(run_id) == []
    assert shown(stack, run_id) == []
    entries = [row for row in admin(stack, "audit")["items"] if row["target"] == dry["id"]]
    assert [(row["what"], row["result"]) for row in entries] == [("cleanup.apply", "ordered: 1 kill")]


def test_local_looks_at_this_host_without_the_api(stack: Stack) -> None:
    run_id = submit(stack.tenant, "touch here; sleep 60")
    started(stack.tenant, run_id)
    stack.wait_for_file(run_id, "here")

    environment = {
        "PATH": os.environ["PATH"], "BLASTDOOR_RUNTIME_DIR": str(stack.runtime_dir),
        "BLASTDOOR_URL": "http://127.0.0.1:1", "BLASTDOOR_KEY": "bd_a_nobody",
    }  # fmt: skip

    def local(*arguments: str, status: int = 0) -> list[tuple[str, str, str | None]]:
        command = [*BLASTDOOR, "admin", "cleanup", "--local", "--state", str(stack.state), "--json", *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert ended.returncode == status, ended.stderr
        document = json.loads(ended.stdout)
        assert (document["database"], document["installation"]) == (True, stack.installation)
        return [(line["ref"]["run_id"], line["action"], line["result"]) for line in document["actions"]]

    assert local("--run", run_id) == [(run_id, "refuse", None)]
    assert local("--run", run_id, "--apply", status=1) == [(run_id, "refuse", "refused")]
    assert stack.group(run_id).pids(), "it plays on"
    assert local("--run", run_id, "--apply", "--force") == [(run_id, "kill", "destroyed")]

    run = finished(stack.tenant, run_id)
    assert (run["outcome"], run["reason"]) == ("cancelled", "cancelled_by_operator")
    assert stack.left_of(run_id) == []
    entries = [row for row in admin(stack, "audit")["items"] if row["what"] == "cleanup.local"]
    assert [row["result"].split()[1] for row in entries] == ["destroyed", "refused"], "newest first"
