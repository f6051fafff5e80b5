"""The pages, as strings. Whatever comes from outside - a customer's file, a guest's output - passes `_text`."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from examples.main_app.inbox import Customer, Shown

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 56rem; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.5rem; margin-bottom: 0; } .sub { color: #5b6577; margin-top: 0; }
article { border: 1px solid #d9dee7; border-left-width: 6px; border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; }
article.passed { border-left-color: #1a7f4b; } article.waiting { border-left-color: #9aa4b5; }
article.failed, article.timed_out, article.limit_exceeded { border-left-color: #b3261e; }
article.errored, article.cancelled { border-left-color: #b26a00; }
article h2 { font-size: 1.05rem; margin: 0; } article p { margin: .2rem 0; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; } td { padding: .15rem .75rem .15rem 0; }
td { white-space: nowrap; } td:nth-child(2) { white-space: normal; width: 100%; } select, button { font: inherit; }
td.n, .wall { color: #5b6577; font-size: .9rem; } form { margin: 1rem 0; } code { font-size: .9rem; }
pre { background: #f4f6f9; padding: .8rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap; }
"""
_WORDS = {
    "passed": "passed", "failed": "failed", "timed_out": "took too long", "limit_exceeded": "used too much",
    "cancelled": "was cancelled", "errored": "could not be tried; this is our fault, and it is not counted",
}  # fmt: skip


_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {ord(char) for char in "\t\n\r"}
_DIRECTIONS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_SHOWN = {code: f"\\x{code:02x}" for code in _CONTROLS} | {code: f"\\u{code:04x}" for code in _DIRECTIONS}


def _text(said: str) -> str:
    """No markup, no control characters, and nothing that turns around what stands beside it."""
    return escape(said.translate(_SHOWN))


def page(title: str, body: str, *, again_in_s: int | None = None) -> str:
    """A whole document; `again_in_s`: it loads itself again, for as long as something is under way."""
    refresh = f'<meta http-equiv="refresh" content="{again_in_s}">' if again_in_s else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}'
        f'<meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def customer_page(customer: Customer, runs: Sequence[Shown], samples: Sequence[str]) -> str:
    options = "".join(f'<option value="{_text(name)}">{_text(name)}</option>' for name in samples)
    body = (
        f"<h1>{_text(customer.name)}</h1><p class=sub>Discount Desk: your rules, tried before they go live</p>"
        f'<form method="post" enctype="multipart/form-data" action="/c/{_text(customer.link)}/runs">'
        f'<label>Your rules, as an archive: <input type="file" name="bundle"></label> or a sample: '
        f'<select name="sample"><option value="">choose one</option>{options}</select> <button>Try them</button></form>'
    )
    body += "".join(_run(customer, run) for run in runs) or "<p>Nothing tried yet.</p>"
    return page(customer.name, body, again_in_s=None if all(run.destroyed_at for run in runs) else 2)


def _run(customer: Customer, run: Shown) -> str:
    if run.story is None:
        return f'<article class="waiting"><h2>{_text(run.phase)} ...</h2><p class=wall>{_text(run.id)}</p></article>'
    story = run.story
    outcome = str(story["outcome"])
    told_below = any(step["failures"] for step in story["steps"])
    message = f"<p>{_text(story['message'])}</p>" if story.get("message") and not told_below else ""
    return (
        f'<article class="{_text(outcome)}"><h2>{_text(story["scenario"]["name"])}: '
        f"{_text(_WORDS.get(outcome, outcome))}</h2>{message}<table>"
        + "".join(_step(customer, run, step) for step in story["steps"])
        + f"</table>{_left_out(story)}<p class=wall>{_text(_wall(story))}"
        + (f"; gone at {_text(_clock(run.destroyed_at))}" if run.destroyed_at else "; being torn down")
        + f"</p><p class=wall>{_text(run.id)}</p></article>"
    )


def _clock(instant: str) -> str:
    return f"{instant[:19].replace('T', ' ')} UTC"


def _step(customer: Customer, run: Shown, step: Mapping[str, Any]) -> str:
    said = "".join(
        f"<br>{_text(failure['expectation'])}: expected {_text(str(failure['expected']))},"
        f" got {_text(str(failure['actual']))}"
        for failure in step["failures"]
    )
    output = f"/c/{_text(customer.link)}/runs/{_text(run.id)}/{int(step['n'])}"
    return (
        f"<tr><td class=n>{int(step['n'])}</td><td>{_text(step['name'] or '')}{said}</td>"
        f"<td>{_text(step['outcome'])}</td><td class=n>{float(step['duration_s'] or 0):.2f} s</td>"
        f'<td class=n><a href="{output}">output</a></td></tr>'
    )


def _left_out(story: Mapping[str, Any]) -> str:
    """An event is under 20 kB: what did not fit is counted, and the run itself has it."""
    omitted = {name: count for name, count in story["omitted"].items() if count}
    return f"<p class=wall>not shown here: {_text(str(omitted))}</p>" if omitted else ""


def _wall(story: Mapping[str, Any]) -> str:
    placement, evidence = story["placement"], story["evidence"] or {}
    guarantees = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in placement["guarantees"].items())
    seen = f"; seen: {evidence.get('runtime')} {evidence.get('runtime_version') or ''}".rstrip() if evidence else ""
    return f"{placement['boundary']}: {guarantees}{seen}"


def output_page(customer: Customer, title: str, text: str) -> str:
    """Output of a guest, as text."""
    back = f'<p><a href="/c/{_text(customer.link)}">back</a></p>'
    return page(title, f"<h1>{_text(title)}</h1>{back}<pre>{_text(text) or '(nothing)'}</pre>")
