"""The Python in README.md and docs/: every block compiles, and what it imports is there."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SAMPLES = [
    pytest.param(sample, id=f"{document.name}-{n}")
    for document in DOCUMENTS
    for n, sample in enumerate(_BLOCK.findall(document.read_text()), 1)
]


def _imports(sample: str) -> None:
    """Raises SyntaxError, ImportError, AttributeError."""
    for node in ast.walk(ast.parse(sample)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "a sample stands alone: no relative imports"
            module = importlib.import_module(node.module)
            for alias in node.names:
                getattr(module, alias.name)


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_compiles_and_what_it_imports_is_there(sample: str) -> None:
    compile(sample, "sample", "exec")
    _imports(sample)


def test_there_are_samples_in_both_places() -> None:
    found = {document.name for document in DOCUMENTS if _BLOCK.search(document.read_text())}
    assert {"README.md", "integration.md"} <= found


@pytest.mark.parametrize(
    ("sample", "error"),
    [
        ("def f(:\n", SyntaxError),
        ("import service.nothing_of_that_name\n", ImportError),
        ("from service.client import nothing_of_that_name\n", AttributeError),
    ],
)
def test_control_a_bad_sample_is_seen(sample: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        _imports(sample)
