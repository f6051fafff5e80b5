"""GET /v1/runs/{id}/junit.xml as it is served, on both databases (D36): strict XML for any output."""

import xml.etree.ElementTree as ElementTree

import pytest

from service.core.ids import new_run_id
from service.core.run import Outcome, Reason
from tests.factories import make_result, make_step_result
from tests.integration.api.conftest import DATABASES, Served

pytestmark = pytest.mark.parametrize("settings", DATABASES, indirect=True)
HOSTILE = '\x1b[31m]]><!ENTITY x SYSTEM "file:///etc/passwd">&x;</system-out>\x0b\r\n\ufffe\uffff\x7f\u202e'


def finished(served: Served, who: str = "acme", *, outcome: Outcome = Outcome.PASSED, text: str = "") -> str:
    run_id = str(served.submit(who)["id"])
    claim = served.claim()
    served.store.mark_running(run_id, claim.fence)
    served.store.mark_collecting(run_id, claim.fence)
    reason = None if outcome is Outcome.PASSED else Reason.CANCELLED_BY_TENANT
    served.store.finish(
        run_id, claim.fence, make_result(outcome=outcome, reason=reason, steps=(make_step_result(text=text),))
    )
    served.store.record_destroyed(run_id, claim.fence)
    return run_id


def test_a_report_parses_strictly_whatever_was_printed_and_is_harmless_in_a_browser(served: Served) -> None:
    run_id = finished(served, text=HOSTILE)
    answer = served.client("acme").get(f"/v1/runs/{run_id}/junit.xml")

    assert answer.status_code == 200, answer.text
    said = ElementTree.fromstring(answer.content).findtext("testsuite/testcase/system-out")
    assert said == HOSTILE.replace("\x1b", r"\x1b").replace("\x0b", r"\x0b").replace("\ufffe\uffff", r"\ufffe\uffff")
    assert answer.headers["content-type"] == "application/xml"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"] == f'attachment; filename="{run_id}.junit.xml"'
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")


def test_a_cancelled_run_is_red(served: Served) -> None:
    run_id = finished(served, outcome=Outcome.CANCELLED)
    suite = ElementTree.fromstring(served.client("acme").get(f"/v1/runs/{run_id}/junit.xml").content).find("testsuite")
    assert suite is not None
    assert (suite.attrib["failures"], suite.attrib["tests"]) == ("1", "2")


def test_an_unfinished_run_has_no_report_yet(served: Served) -> None:
    run_id = served.submit()["id"]
    answer = served.client("acme").get(f"/v1/runs/{run_id}/junit.xml")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_finished")


def test_what_is_another_s_is_as_absent_as_what_never_was(served: Served) -> None:
    run_id = finished(served)
    for asked in (run_id, new_run_id(), "..%2f..%2fadmin"):
        answer = served.client("globex").get(f"/v1/runs/{asked}/junit.xml")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert served.client("nobody").get(f"/v1/runs/{run_id}/junit.xml").status_code == 401
    assert served.client("operator").get(f"/v1/runs/{run_id}/junit.xml").status_code == 403
