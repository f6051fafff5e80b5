"""The end of `make demo`: a small application of many customers at the other end (`examples/main_app`).

It is started as a process of its own, against the service that runs, and used as its customers would: with a link each.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
WITHIN_S = 60.0
CHOSEN = {"Ada's Bakery": "rule engine", "Bolt Bikes": "birthday discount, with a mistake"}
TOLD = {"Ada's Bakery": "discount rules: passed", "Bolt Bikes": "birthday discount: failed"}


@contextmanager
def application(ready: Mapping[str, Any], *, port: int, state: Path) -> Iterator[dict[str, str]]:
    """Start it, and stop it. -> each customer's link, by name."""
    state.mkdir()
    environment = dict(os.environ) | {"BLASTDOOR_SERVICE_KEY": ready["service_key"]}
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.main_app", "--url", ready["url"], "--redis", ready["redis_url"],
         "--port", str(port), "--state", str(state)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        links: dict[str, str] = {}
        while len(links) < len(CHOSEN) and (line := process.stdout.readline()):
            name, _, link = line.strip().partition(": ")
            links[name] = link
        if len(links) < len(CHOSEN):
            raise RuntimeError(f"the application ended with {process.wait()}")
        yield links
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def show(links: Mapping[str, str], *, say: Callable[[str], None]) -> list[str]:
    """Each customer tries something and reads its page. -> what was not as expected."""
    failures: list[str] = []
    with httpx.Client(trust_env=False, timeout=30, follow_redirects=True) as browser:
        for name, sample in CHOSEN.items():
            browser.post(f"{links[name]}/runs", data={"sample": sample}).raise_for_status()
        pages = {name: _settled(browser, link) for name, link in links.items()}
        counts = _both_ways(browser, next(iter(links.values())).rpartition("/c/")[0])
    for name, page in pages.items():
        say(f"{name}'s page, {links[name][:40]}...")
        for line in _lines(page):
            say(f"    {line}")
        if TOLD[name] not in page:
            failures.append(f"{name} was not told: {TOLD[name]}")
        if any(told in page for other, told in TOLD.items() if other != name):
            failures.append(f"{name} sees what is another's")
    say("")
    say(f"events taken in once each: {counts['events']}; first by the stream {counts['first_by_stream']},")
    say(f"first by webhook {counts['first_by_webhook']}, and by the other way again {counts['by_both']}")
    if not counts["events"] or counts["by_both"] != counts["events"]:
        failures.append(f"not every event came by both ways: {counts}")
    return failures


def _settled(browser: httpx.Client, link: str) -> str:
    """The page's text once nothing is under way any more: it does not ask to be loaded again then."""
    deadline = time.monotonic() + WITHIN_S
    while "refresh" in (page := browser.get(link).raise_for_status().text) and time.monotonic() < deadline:
        time.sleep(0.2)
    return unescape(page)


def _both_ways(browser: httpx.Client, base: str) -> dict[str, int]:
    """The counts, when each event has come by both ways, or as they are in the end."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        counts: dict[str, int] = browser.get(f"{base}/status").raise_for_status().json()
        if counts["by_both"] == counts["events"] or time.monotonic() > deadline:
            return counts
        time.sleep(0.2)


def _lines(page: str) -> Iterator[str]:
    """The results on a page, as text."""
    for article in re.findall(r"<article.*?</article>", page, re.DOTALL):
        spaced = re.sub(r"</(h2|p|tr)>|<br>", "\n", article)
        for line in re.sub(r"<[^>]*>", " ", spaced).splitlines():
            if words := " ".join(line.split()).replace(" output", ""):
                yield words
