"""What Prometheus reads of a whole installation: every process at a port of its own, and no word of a guest's."""

import os
import socket
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.stack import NoStack, Stack, eventually, played, run_stack

PROGRAMS = {"api": 0, "relay": 1, "webhooks": 2, "reaper": 3, "worker": 4}
GUESTS_WORD = "guestsaidthis"


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, int]]:
    """A stack of its own, and its first port."""
    port = _free_row(len(PROGRAMS))
    try:
        with run_stack(tmp_path_factory.mktemp("scraped"), BLASTDOOR_METRICS_ADDRESS=f"127.0.0.1:{port}") as stack:
            yield stack, port
    except NoStack as lacking:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(lacking))


def _free_row(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(21000, 29000, count):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


def values(port: int) -> dict[str, float]:
    """Each sample's value by `name{label=value,...}`."""
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=30).raise_for_status()
    return {
        sample.name + "{" + ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items())) + "}": sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_every_process_says_what_it_is(scraped: tuple[Stack, int]) -> None:
    _, port = scraped
    for program, n in PROGRAMS.items():
        found = [name for name in values(port + n) if name.startswith("blastdoor_build_info{")]
        assert len(found) == 1, program
        assert f"program={program}" in found[0]


def test_a_run_moves_the_numbers_of_all_that_had_a_part_in_it(scraped: tuple[Stack, int]) -> None:
    stack, port = scraped
    ended = "blastdoor_runs_finished_total{boundary=gvisor,outcome=failed,reason=exit_code}"
    published = "blastdoor_events_published_total{type=run.finished}"
    accepted = "blastdoor_runs_accepted_total{}"

    def now() -> list[float]:
        return [
            values(port + PROGRAMS[program]).get(name, 0.0)
            for program, name in (("api", accepted), ("relay", published), ("worker", ended))
        ]

    before = now()
    run = played(stack.tenant, f"echo {GUESTS_WORD}; exit 3")
    assert run["outcome"] == "failed"
    wanted = [value + 1 for value in before]
    assert eventually(lambda: now() == wanted), (wanted, now())
    worker = values(port + PROGRAMS["worker"])
    for phase in ("queue_wait", "provisioning", "playing", "collecting"):
        assert worker[f"blastdoor_run_phase_duration_seconds_count{{boundary=gvisor,phase={phase}}}"] >= 1


def test_no_scrape_names_a_tenant_a_run_or_what_a_guest_said(scraped: tuple[Stack, int]) -> None:
    stack, port = scraped
    run = played(stack.tenant, f"echo {GUESTS_WORD}", metadata={"word": GUESTS_WORD})
    shown = httpx.get(f"{stack.ready['url']}/v1/runs/{run['id']}", headers=stack.tenant.headers, trust_env=False).text
    text = "".join(
        httpx.get(f"http://127.0.0.1:{port + n}/metrics", trust_env=False, timeout=30).text for n in PROGRAMS.values()
    )
    for word in (GUESTS_WORD, run["id"], run["tenant"] + '"'):
        assert word in shown, "the search would find it"
        assert word not in text
    assert "blastdoor_" in text
