"""The pages, as strings. Whatever comes from outside - a customer's file, a guest's output - passes `escape`."""

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
table { border-collapse: collapse; width: 100%; margin: .5rem 0; } td { padding: .15rem .5rem .15rem 0; }
td.n, .wall { color: #5b6577; font-size: .9rem; } form { margin: 1rem 0; } code { font-size: .9rem; }
pre { background: #f4f6f9; padding: .8rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap; }
"""
_WORDS = {
    "passed": "passed", "failed": "failed", "timed_out": "took too long", "limit_exceeded": "used too much",
    "cancelled": "was cancelled", "errored": "could not be tried; this is our fault, and it is not counted",
}  # fmt: skip


def page(title: str, body: str, *, again_in_s: int | None = None) -> str:
    """A whole document; `again_in_s`: it loads itself again, for as long as something is under way."""
    refresh = f'<meta http-equiv="refresh" content="{again_in_s}">' if again_in_s else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def customer_page(customer: Customer, runs: Sequence[Shown], samples: Sequence[str]) -> str:
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in samples)
    body = (
        f"<h1>{escape(customer.name)}</h1><p class=sub>Discount Desk: your rules, tried before they go live</p>"
        f'<form method="post" enctype="multipart/form-data" action="/c/{escape(customer.link)}/runs">'
        f'<label>Your rules, as an archive: <input type="file" name="bundle"></label> or a sample: '
        f'<select name="sample"><option value=""></option>{options}</select> <button>Try them</button></form>'
    )
    body += "".join(_run(customer, run) for run in runs) or "<p>Nothing tried yet.</p>"
    return page(customer.name, body, again_in_s=None if all(run.destroyed_at for run in runs) else 2)


def _run(customer: Customer, run: Shown) -> str:
    if run.story is None:
        return f'<article class="waiting"><h2>{escape(run.phase)} ...</h2><p class=wall>{escape(run.id)}</p></article>'
    story = run.story
    outcome = str(story["outcome"])
    message = f"<p>{escape(story['message'])}</p>" if story.get("message") else ""
    return (
        f'<article class="{escape(outcome)}"><h2>{escape(story["scenario"]["name"])}: '
        f"{escape(_WORDS.get(outcome, outcome))}</h2>{message}<table>"
        + "".join(_step(customer, run, step) for step in story["steps"])
        + f"</table>{_left_out(story)}<p class=wall>{escape(_wall(story))}"
        + (f"; gone at {escape(run.destroyed_at)}" if run.destroyed_at else "; being torn down")
        + f"</p><p class=wall>{escape(run.id)}</p></article>"
    )


def _step(customer: Customer, run: Shown, step: Mapping[str, Any]) -> str:
    said = "".join(
        f"<br>{escape(failure['expectation'])}: expected {escape(str(failure['expected']))},"
        f" got {escape(str(failure['actual']))}"
        for failure in step["failures"]
    )
    output = f"/c/{escape(customer.link)}/runs/{escape(run.id)}/{int(step['n'])}"
    return (
        f"<tr><td class=n>{int(step['n'])}</td><td>{escape(step['name'] or '')}{said}</td>"
        f"<td>{escape(step['outcome'])}</td><td class=n>{float(step['duration_s'] or 0):.2f} s</td>"
        f'<td class=n><a href="{output}">output</a></td></tr>'
    )


def _left_out(story: Mapping[str, Any]) -> str:
    """An event is under 20 kB: what did not fit is counted, and the run itself has it."""
    omitted = {name: count for name, count in story["omitted"].items() if count}
    return f"<p class=wall>not shown here: {escape(str(omitted))}</p>" if omitted else ""


def _wall(story: Mapping[str, Any]) -> str:
    placement, evidence = story["placement"], story["evidence"] or {}
    guarantees = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in placement["guarantees"].items())
    seen = f"; seen: {evidence.get('runtime')} {evidence.get('runtime_version')}" if evidence else ""
    return f"{placement['boundary']}: {guarantees}{seen}"


def output_page(customer: Customer, title: str, text: str) -> str:
    """Output of a guest, as text."""
    back = f'<p><a href="/c/{escape(customer.link)}">back</a></p>'
    return page(title, f"<h1>{escape(title)}</h1>{back}<pre>{escape(text) or '(nothing)'}</pre>")
