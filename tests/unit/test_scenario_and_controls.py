"""The two documents of a run as values: strict, frozen, the same after storage; a request only within its ceilings."""

from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from service.core.controls import PLATFORM_CEILINGS, Controls, Limits, apply
from service.core.errors import DocumentInvalid
from service.core.scenario import Scenario
from service.core.tenancy import CeilingLimits, Ceilings, Tenant, Trust
from tests.factories import make_controls, make_scenario, make_tenant

MIB = 2**20


def make_step(**words: Any) -> dict[str, Any]:
    return {"name": "s", "run": "x"} | words


def with_step(**words: Any) -> dict[str, Any]:
    return {"name": "n", "steps": [make_step(**words)]}


class TestScenario:
    @pytest.mark.parametrize(
        "document",
        [
            {"name": "n", "steps": []},
            {"name": "", "steps": [make_step()]},
            {"name": "n", "steps": [make_step()] * 101},
            {"name": "n", "steps": [make_step()], "unknown": 1},
            {"name": "n", "steps": [make_step()], "runtime": "../etc"},
            {"name": "n", "steps": [make_step()], "runtime": "a\n"},
            {"name": "n", "steps": [make_step()], "artifacts": ["/etc/passwd"]},
            {"name": "n", "steps": [make_step()], "artifacts": ["a/../b"]},
            {"name": "\ud800", "steps": [make_step()]},
            with_step(run=""),
            with_step(run=[]),
            with_step(run=[""]),
            with_step(run=["a\0b"]),
            with_step(run=7),
            with_step(env={"1A": "x"}),
            with_step(env={"A\n": "x"}),
            with_step(env={"A=B": "x"}),
            with_step(env={"A": "x\0"}),
            with_step(env={"A": True}),
            with_step(env={"A": None}),
            with_step(env={"A": "x" * 70_000}),
            with_step(timeout=5),
            with_step(timeout="0s"),
            with_step(always="yes"),
            with_step(stdin="x" * (MIB + 1)),
            with_step(expect={"exit_code": 256}),
            with_step(expect={"exit_code": True}),
            with_step(expect={"stdout": {"matches": "("}}),
            with_step(expect={"stdout": {"matches": "(?=a)"}}),
            with_step(expect={"stdout": {"exists": True}}),
            with_step(expect={"files": {"../x": {"exists": True}}}),
            with_step(expect={"files": {"x": {"exists": False, "equals": "a"}}}),
            with_step(expect={"max_seconds": 0}),
        ],
        ids=lambda document: str(document)[:80].encode("ascii", "backslashreplace").decode(),
    )
    def test_what_is_wrong_is_refused(self, document: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Scenario.model_validate(document)

    def test_a_string_is_for_the_shell_and_a_list_is_the_arguments(self) -> None:
        text, words = make_scenario(run="a | b").steps[0], make_scenario(run=["a", "|", ""]).steps[0]

        assert text.argv == ("/bin/sh", "-c", "a | b")
        assert words.argv == ("a", "|", "")

    def test_a_steps_environment_is_the_documented_names_then_the_scenarios_then_its_own(self) -> None:
        scenario = make_scenario(env={"A": "1", "B": 2, "HOME": "/x"}, steps=[make_step(env={"B": "3", "LANG": "C"})])

        assert scenario.environment(scenario.steps[0]) == {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/x", "LANG": "C",
            "TMPDIR": "/tmp", "A": "1", "B": "3",
        }  # fmt: skip

    def test_it_is_the_same_after_it_was_stored_and_an_absent_expectation_stays_absent(self) -> None:
        scenario = make_scenario(
            env={"PORT": 8080},
            steps=[
                make_step(timeout="1.5s", expect={"stdout": {"json": None}, "exit_code": None}),
                make_step(run=["a"], expect={"files": {"out/a": {"exists": False}}}),
            ],
        )  # fmt: skip
        again = Scenario.model_validate_json(scenario.model_dump_json(by_alias=True, exclude_unset=True))

        assert again == scenario
        assert again.digest == scenario.digest
        assert again.steps[0].expect.stdout is not None
        assert again.steps[0].expect.stdout.given == {"json"}

    def test_the_digest_is_of_the_meaning_and_each_change_of_it_changes_the_digest(self) -> None:
        base = make_scenario(env={"A": "1", "B": "2"})
        reordered = make_scenario(env={"B": "2", "A": "1"})
        others = [make_scenario(name="x"), make_scenario(run="false"), make_scenario(artifacts=["a"])]

        assert base.digest == reordered.digest
        assert len({scenario.digest for scenario in (base, make_scenario(), *others)}) == 5


class TestControls:
    @pytest.mark.parametrize(
        "document",
        [
            {"unknown": 1},
            {"isolation": "none"},
            {"needs": ["root"]},
            {"limits": {"memory": "1MiB"}},
            {"limits": {"memory": "-1"}},
            {"limits": {"pids": 1.5}},
            {"limits": {"pids": True}},
            {"limits": {"cpu": 0}},
            {"limits": {"wall": 60}},
            {"limits": {"swap": "1GiB"}},
            {"network": {"mode": "all"}},
            {"network": {"mode": "allow"}},
            {"network": {"mode": "none", "allow": ["a.example:443"]}},
            {"network": {"mode": "allow", "allow": ["a.example"]}},
            {"network": {"mode": "allow", "allow": ["a.example:443\n"]}},
        ],
        ids=str,
    )
    def test_what_is_wrong_is_refused(self, document: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Controls.model_validate(document)

    @pytest.mark.parametrize(
        ("trust", "asked", "applied"),
        [
            (Trust.UNTRUSTED, None, Trust.UNTRUSTED),
            (Trust.UNTRUSTED, "untrusted", Trust.UNTRUSTED),
            (Trust.TRUSTED, None, Trust.TRUSTED),
            (Trust.TRUSTED, "untrusted", Trust.UNTRUSTED),
            (Trust.TRUSTED, "trusted", Trust.TRUSTED),
        ],
    )
    def test_code_is_as_trusted_as_its_tenant_at_most(self, trust: Trust, asked: str | None, applied: Trust) -> None:
        assert make_controls(tenant=make_tenant(trust=trust), code=asked).code is applied

    def test_an_untrusted_tenant_may_not_call_its_code_trusted(self) -> None:
        with pytest.raises(DocumentInvalid) as refusal:
            make_controls(code="trusted")

        assert refusal.value.code == "controls_invalid"
        assert [row["path"] for row in refusal.value.errors] == ["code"]

    def test_without_ceilings_the_defaults_are_applied_as_they_are(self) -> None:
        assert make_controls().limits == Limits()

    @pytest.mark.parametrize("name", list(Limits.model_fields))
    def test_no_limit_is_ever_above_the_platforms(self, name: str) -> None:
        ceiling = getattr(PLATFORM_CEILINGS, name)
        assert getattr(make_controls(limits={name: ceiling}).limits, name) == ceiling
        above = ceiling + timedelta(seconds=1) if isinstance(ceiling, timedelta) else ceiling + 1
        with pytest.raises(DocumentInvalid, match="above the platform's ceiling") as refusal:
            make_controls(limits={name: above})

        assert [row["path"] for row in refusal.value.errors] == [f"limits.{name}"]

    def test_a_limit_above_the_tenants_ceiling_is_an_error_and_a_default_above_it_is_the_ceiling(self) -> None:
        tenant = _bounded(memory="64MiB", wall="10s", cpu=0.5)

        applied = apply(Controls(), tenant).limits
        assert (applied.memory, applied.wall, applied.cpu) == (64 * MIB, timedelta(seconds=10), 0.5)
        with pytest.raises(DocumentInvalid) as refusal:
            apply(Controls.model_validate({"limits": {"memory": "65MiB", "wall": "11s", "pids": 64}}), tenant)
        assert refusal.value.errors == [
            {"path": "limits.memory", "message": "65MiB is above the tenant's ceiling; at most 64MiB"},
            {"path": "limits.wall", "message": "11s is above the tenant's ceiling; at most 10s"},
        ]

    def test_a_tenants_ceiling_above_the_platforms_raises_nothing(self) -> None:
        with pytest.raises(DocumentInvalid, match="above the platform's ceiling; at most 900s"):
            apply(Controls.model_validate({"limits": {"wall": "901s"}}), _bounded(wall="2h"))

    @pytest.mark.parametrize(
        "ceiling", [{"memory": "1MiB"}, {"pids": 1}, {"cpu": 0.01}, {"disk": 0}, {"files": 1}, {"output": 1}]
    )
    def test_a_ceiling_below_what_any_run_needs_is_no_ceiling(self, ceiling: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            _bounded(**ceiling)


def _bounded(**limits: Any) -> Tenant:
    return make_tenant(ceilings=Ceilings(limits=CeilingLimits.model_validate(limits)))
