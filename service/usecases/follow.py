"""Watching a run: what is told of it, in order, from any mark on. The store is the truth; nothing here remembers."""

import re
from dataclasses import dataclass
from datetime import timedelta

from service.core.errors import DocumentInvalid
from service.core.news import (
    START,
    Mark,
    NewsPage,
    one_line,
    render_phase,
    render_told_phase,
)
from service.core.ports.runs import NewsStore
from service.core.run import Phase
from service.core.waiting import explained
from service.usecases.fetch import checked_run_id

ROWS = 16
"""Read at once: with `MAX_DATA_BYTES` each, at most 256 KiB are held for one watcher."""
_RESULT_K = 1
_MARK = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Told:
    """`data` is JSON on one line, in ASCII; `event`: phase, progress, output or result."""

    mark: Mark
    event: str
    data: str


@dataclass(frozen=True, kw_only=True)
class TellingPage:
    """`after`: where the next page begins. `more`: it is there already. `ended`: there will be none."""

    items: tuple[Told, ...]
    after: Mark
    more: bool
    ended: bool


def read_mark(text: str | None, *, path: str) -> Mark:
    """Where to go on after; None is the beginning. Raises DocumentInvalid for what was never an id of ours."""
    if text is None:
        return START
    found = _MARK.fullmatch(text)
    if found is None:
        raise DocumentInvalid("request", [{"path": path, "message": "should be the id of an event, as it was given"}])
    return int(found[1]), int(found[2])


def next_told(runs: NewsStore, *, run_id: str, tenant: str, after: Mark, worker_fresh: timedelta) -> TellingPage:
    """What follows the mark, as much as one page holds; that it is queued comes with what it waits for, as it is when
    that is told. Raises NotFound."""
    page = runs.read_news(checked_run_id(run_id), tenant, after=after, limit=ROWS)
    if page.now.phase is Phase.QUEUED and (page.seq, 0) > after:
        view = runs.queue_views([run_id], worker_fresh=worker_fresh).get(run_id)
        page = page.model_copy(update={"now": explained(page.now, view)})
    items = sorted([*_phases(page, after=after), *_news(page)], key=lambda told: told.mark)
    if page.more:
        # The phases are all there, the rest is not: what lies behind the last piece of it waits for its turn.
        last = page.news[-1].mark
        items = [told for told in items if told.mark <= last]
        return TellingPage(items=tuple(items), after=last, more=True, ended=False)
    finished = page.now.phase is Phase.FINISHED
    if finished and (page.seq, _RESULT_K) > after:
        run = runs.get_run(run_id, tenant)
        result = one_line(run.model_dump(mode="json"))
        items.append(Told(mark=(page.seq, _RESULT_K), event="result", data=result))
    return TellingPage(items=tuple(items), after=items[-1].mark if items else after, more=False, ended=finished)


def _phases(page: NewsPage, *, after: Mark) -> list[Told]:
    """From the run's events; where they are no longer kept, the phase that it is in comes from its record."""
    told = {
        seq: render_told_phase(event, now=page.now if seq == page.seq else None) for seq, event in page.phases.items()
    }
    if (page.seq, 0) > after:
        told.setdefault(page.seq, render_phase(page.now))
    return [Told(mark=(seq, 0), event="phase", data=data) for seq, data in told.items()]


def _news(page: NewsPage) -> list[Told]:
    return [Told(mark=news.mark, event=news.kind.value, data=news.data) for news in page.news]
