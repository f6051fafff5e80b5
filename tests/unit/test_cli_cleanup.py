"""`blastdoor admin` about what stands on the sites: what is asked of the service, what is printed, how it ends."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from service.cli.main import make_app

_AT = {"BLASTDOOR_URL": "http://127.0.0.1:1", "BLASTDOOR_KEY": "bd_a_x"}
NAME = "bd-0192f0c1d2e37a4b8c9d0e1f2a3b4c5d-f1"


class Service:
    """Answers each request with the next document, the last one again and again, and remembers what it was asked."""

    def __init__(self, *answers: dict[str, Any], status: int = 200) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answers, self._status = list(answers), status

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else dict(request.url.params)
        self.asked.append((f"{request.method} {request.url.path}", body))
        if not self._answers:
            return httpx.Response(204)
        return httpx.Response(self._status, json=self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])

    def hears(self, *arguments: str) -> Result:
        answer: Callable[[httpx.Request], httpx.Response] = self
        return CliRunner().invoke(make_app(), ["admin", *arguments], obj=httpx.MockTransport(answer), env=_AT)


def plan(*results: str | None, applied: bool = False, done: bool = True, action: str = "destroy") -> dict[str, Any]:
    line = {"ref": {"name": NAME}, "action": action, "why": "no run claims it"}
    at = "2026-01-02T03:04:05Z"
    return {
        "id": "cln_1", "applied": applied, "done_at": at if applied and done else None,
        "actions": [line | {"result": result} for result in results],
    }  # fmt: skip


def test_a_clean_up_is_a_dry_run_that_says_how_to_do_exactly_that() -> None:
    service = Service(plan(None))

    result = service.hears("cleanup", "--tenant", "acme", "--orphans", "--older-than", "30m")

    assert result.exit_code == 0
    scope = {"tenant": "acme", "orphans": True, "older_than_s": 1800.0}
    assert service.asked == [("POST /v1/admin/cleanup", {"dry_run": True, "force": False, "scope": scope})]
    for words in (NAME, "no run claims it", "--apply --plan cln_1"):
        assert words in result.stdout


def test_applying_applies_the_plan_that_was_just_made() -> None:
    service = Service(plan(None), plan("destroyed", applied=True))

    result = service.hears("cleanup", "--run", "run_1", "--apply", "--force")

    assert result.exit_code == 0
    assert [body for _, body in service.asked] == [
        {"dry_run": True, "force": True, "scope": {"run": "run_1"}}, {"dry_run": False, "force": True, "plan": "cln_1"}
    ]  # fmt: skip
    assert "destroyed" in result.stdout


def test_a_plan_that_was_shown_is_applied_as_it_was() -> None:
    service = Service(plan("destroyed", applied=True))

    assert service.hears("cleanup", "--plan", "cln_1", "--apply", "--json").exit_code == 0
    assert [body for _, body in service.asked] == [{"dry_run": False, "force": False, "plan": "cln_1"}]


@pytest.mark.parametrize("results", [("destroyed", "refused"), ("quarantined: it resists",), (None,)])
def test_what_did_not_come_off_is_status_1(results: tuple[str | None, ...]) -> None:
    applied = plan(*results, applied=True, done=None not in results)

    result = Service(plan(*(None for _ in results)), applied).hears("cleanup", "--orphans", "--apply")

    assert result.exit_code == 1
    assert ("still works" in result.stdout) is (None in results)


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("--apply",), ("--force",), ("--plan", "cln_1"), ("--plan", "cln_1", "--apply", "--orphans"),
        ("--older-than", "soon"), ("--local", "--plan", "cln_1"),
    ],
)  # fmt: skip
def test_what_says_nothing_or_too_much_is_bad_usage_and_asks_nothing(arguments: tuple[str, ...]) -> None:
    service = Service(plan(None))

    assert service.hears("cleanup", *arguments).exit_code == 2
    assert service.asked == []


def test_boundaries_are_a_table_or_json() -> None:
    row = {
        "kind": "gvisor", "variant": None, "site": "host-1", "name": NAME, "run": "run_1", "tenant": "ac\x1b[31mme",
        "fence": 1, "created_at": "2026-01-02T03:04:05Z", "expires_at": "", "observed_at": "", "state": "overdue",
        "age_s": 185.2, "standby": None,
    }  # fmt: skip
    shown = Service({"items": [row]}).hears("boundaries").stdout

    assert "\x1b" not in shown
    assert all(words in shown for words in ("overdue", "host-1", NAME, "3 min 5 s", "run_1", "gvisor"))
    assert "standby" not in shown, "nothing here is one"
    kept = row | {"kind": "cluster", "variant": "kind", "fence": 0, "tenant": "_standby", "standby": "being_made"}
    shown = Service({"items": [row, kept]}).hears("boundaries").stdout
    assert all(words in shown for words in ("cluster/kind", "_standby", "being made"))
    assert shown.count("run_1") == 1, "no run has it yet"
    assert json.loads(Service({"items": [row]}).hears("boundaries", "--json").stdout)["items"] == [row]
    assert Service({"items": []}).hears("boundaries").stdout == "nothing stands on any site\n"


def test_draining_forgetting_and_purging_ask_what_they_say() -> None:
    drain = Service({"id": "wrk_1", "state": "draining", "playing": 2}, status=202)
    assert drain.hears("drain", "wrk_1").stdout == "wrk_1 is draining; it plays 2\n"
    assert drain.asked == [("POST /v1/admin/drain", {"worker": "wrk_1"})]

    forget = Service()
    assert forget.hears("forget-site", "host-1", "--force").stdout == "host-1 is forgotten\n"
    assert forget.asked == [("DELETE /v1/admin/sites/host-1", {"force": "true"})]

    counted = {"runs": 3, "blobs": 2, "events": 9}
    for arguments, words, dry_run in (((), "a dry run", True), (("--apply",), "given up: 3 runs", False)):
        purge = Service(counted)
        assert words in purge.hears("purge", "--older-than", "12h", *arguments).stdout
        assert purge.asked == [("POST /v1/admin/purge", {"older_than_s": 43200.0, "dry_run": dry_run})]
    assert Service(counted).hears("purge").exit_code == 2


def test_the_audit_log_is_shown_with_where_more_of_it_is() -> None:
    row = {
        "id": "aud_1", "at": "2026-01-02T03:04:05Z", "who": "key_1", "what": "run.kill", "target": "run_1",
        "detail": {}, "result": None,
    }  # fmt: skip
    shown = Service({"items": [row], "next_cursor": "aud_1"}).hears("audit", "--limit", "1").stdout

    assert all(words in shown for words in ("run.kill", "run_1", "not known", "key_1", "--cursor aud_1"))
