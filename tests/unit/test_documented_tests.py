"""Each test that our documents name is there: no threat is "shown by" what was renamed or removed."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "cluster_templates").rglob("*.md")),
]
_FILE = re.compile(r"(?<![\w/])(?:tests/)?((?:[a-z0-9_]+/)*test_[a-z0-9_]+\.py)((?:::\w+)*)")
_NAME = re.compile(r"(?<![\w/.:])(test_[a-z0-9_]+(?![\w.*])|Test[A-Z]\w+)")


@pytest.fixture(scope="module")
def tests() -> Mapping[str, str]:
    """Path below tests/, and text."""
    folder = ROOT / "tests"
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}


def absent(text: str, tests: Mapping[str, str]) -> Iterator[str]:
    """What is named and not there."""
    for path, inside in _FILE.findall(text):
        found = [said for name, said in tests.items() if f"/{name}".endswith(f"/{path}")]
        for name in ["", *filter(None, inside.split("::"))]:
            if not any(_defines(said, name) for said in found):
                yield f"{path}::{name}" if name else path
    for name in _NAME.findall(_FILE.sub("", text)):
        if not any(_defines(said, name) for said in tests.values()):
            yield name


def _defines(text: str, name: str) -> bool:
    return not name or re.search(rf"^\s*(?:async def|def|class) {name}\b", text, re.MULTILINE) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_test_that_a_document_names_is_there(document: Path, tests: Mapping[str, str]) -> None:
    assert list(absent(document.read_text(), tests)) == []


def test_control_what_is_not_there_is_seen_and_much_is_named(tests: Mapping[str, str]) -> None:
    here, it = "unit/test_documented_tests.py", "test_control_what_is_not_there_is_seen_and_much_is_named"
    assert list(absent(f"`{here}::{it}`, `tests/{here}`, `{it}`", tests)) == []
    said = f"`unit/test_nothing.py`; `{here}::test_nothing`, `TestNothing`; `integration/test_documented_tests.py`"
    gone = ["unit/test_nothing.py", f"{here}::test_nothing", "integration/test_documented_tests.py", "TestNothing"]
    assert list(absent(said, tests)) == gone
    named = [name for document in DOCUMENTS for name in _FILE.findall(document.read_text())]
    assert len(named) > 50
