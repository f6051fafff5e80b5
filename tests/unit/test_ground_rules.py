"""The rules of tests/ground_rules.py, tried on small test files in a pytest of their own."""

from pathlib import Path

import pytest

from tests.again import why_not

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rules(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("CI", raising=False)
    return pytester


def _run(rules: pytest.Pytester, *args: str) -> pytest.RunResult:
    return rules.runpytest_subprocess("-p", "tests.ground_rules", *args)


SKIPS = """
import pytest

def test_that_needs_a_tool():
    pytest.skip("no tool")

@pytest.mark.skip(reason="not today")
def test_that_is_marked(): ...

@pytest.mark.xfail(strict=True)
def test_that_is_known_to_fail():
    assert False
"""


def test_a_skip_is_a_skip_at_home(rules: pytest.Pytester) -> None:
    rules.makepyfile(SKIPS)

    _run(rules).assert_outcomes(skipped=2, xfailed=1)


def test_a_skip_is_a_failure_in_ci_and_says_why(rules: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    rules.makepyfile(SKIPS)

    result = _run(rules)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes().get("skipped") is None
    assert result.parseoutcomes()["xfailed"] == 1
    result.stdout.fnmatch_lines(["*skipped in CI, where nothing that we claim may be: no tool", "*: not today"])


def test_a_skipped_fixture_is_a_failure_in_ci(rules: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    rules.makepyfile(
        """
        import pytest

        @pytest.fixture
        def server(): pytest.skip("no server")

        def test_that_needs_it(server): ...
        """
    )

    _run(rules).assert_outcomes(errors=1)


def test_a_skipped_module_is_a_failure_in_ci(rules: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    rules.makepyfile("import pytest\npytest.importorskip('no_such_module')\ndef test_nothing(): ...")

    result = _run(rules)

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(errors=1)


def test_a_test_is_marked_by_its_folder(rules: pytest.Pytester) -> None:
    for folder in ("unit", "escape"):
        rules.mkpydir(folder).joinpath(f"test_{folder}.py").write_text("def test_it(): ...")

    _run(rules, "-m", "escape", "--strict-markers").assert_outcomes(passed=1, deselected=1)


def test_the_summary_says_what_really_ran(rules: pytest.Pytester) -> None:
    rules.makepyfile(
        """
        from tests.summary import ran

        def test_one(): ran("boundary", "gvisor"); ran("boundary", "fake")

        def test_two(): ran("boundary", "gvisor")
        """
    )

    _run(rules).stdout.fnmatch_lines(["*what the tests ran on*", "boundary: fake (1), gvisor (2)", "database: none"])


def test_the_summary_counts_what_ran_side_by_side(rules: pytest.Pytester) -> None:
    one = 'from tests.summary import ran\n\ndef test_one(): ran("boundary", "gvisor")\n'
    rules.makepyfile(test_a=one, test_b=one)

    result = _run(rules, "-p", "xdist.plugin", "-n", "2", "--dist", "loadfile")

    result.stdout.fnmatch_lines(["*what the tests ran on*", "boundary: gvisor (2)"])


WHERE = """
import os
from pathlib import Path

def test_it():
    with Path("where").open("a") as file:
        file.write(f"{__file__.split('/')[-2]} {os.getpid()}\\n")
"""


def test_tests_that_share_a_cluster_run_in_one_process(rules: pytest.Pytester) -> None:
    for folder in ("unit", "cluster"):
        place = rules.path / "tests" / folder
        place.mkdir(parents=True)
        for name in "abcdef":
            (place / f"test_{folder}_{name}.py").write_text(WHERE)

    _run(rules, "-p", "xdist.plugin", "-n", "2", "--dist", "loadfile", "tests").assert_outcomes(passed=12)

    ran = [line.split() for line in rules.path.joinpath("where").read_text().splitlines()]
    assert len({process for folder, process in ran if folder == "cluster"}) == 1
    assert len({process for folder, process in ran}) == 2, "nothing ran side by side"


def test_those_of_its_driver_have_one_of_their_own(rules: pytest.Pytester) -> None:
    place = rules.path / "tests" / "cluster"
    place.mkdir(parents=True)
    for name in ("namespace_a", "namespace_b", "namespace_c", "escape_a", "escape_b", "lab", "policy"):
        (place / f"test_{name}.py").write_text(WHERE.replace("__file__.split('/')[-2]", "__file__.split('/')[-1][5:8]"))

    _run(rules, "-p", "xdist.plugin", "-n", "2", "--dist", "loadfile", "tests").assert_outcomes(passed=7)

    ran = [line.split() for line in rules.path.joinpath("where").read_text().splitlines()]
    processes = {kind: {process for one, process in ran if one == kind} for kind, _ in ran}
    assert processes["esc"] == processes["lab"] == processes["pol"]
    assert all(len(found) == 1 for found in processes.values())
    assert processes["nam"] != processes["esc"], "nothing ran side by side"


@pytest.mark.parametrize(
    ("failed", "why"),
    [
        (["tests/escape/test_a.py::test_one", "tests/cluster/test_b.py::test_two[x]"], None),
        ([], "no test failed"),
        ([f"tests/escape/test_a.py::test_{n}" for n in range(4)], None),
        ([f"tests/escape/test_{n}.py::test_one" for n in range(4)], "no accident"),
        (
            ["tests/escape/test_a.py::test_one", "tests/unit/test_b.py::test_two"],
            "tests/unit/test_b.py::test_two is not",
        ),
        (["tests/escape/test_a.py"], "is not disturbed"),
    ],
)
def test_only_a_few_tests_of_the_machine_are_played_again(failed: list[str], why: str | None) -> None:
    said = why_not(failed)
    assert (said is None) if why is None else (said is not None and why in said)
    assert why_not(failed, status=3), "what broke off played less than everything"
