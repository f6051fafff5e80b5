"""Manifests are data: read from `cluster_templates/`, and filled in. Pure but for reading the files.

A placeholder is `{{name}}`. Where it is the whole of a value it becomes the value it stands for, a number or a mapping
too; within a longer text, and in labels, annotations and a ConfigMap's data, it becomes text. Nothing else is done.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
"""One object as the API server takes and gives it: what its JSON says."""
PREFIX = "blastdoor.dev/"
FOLDER = Path(__file__).parents[2] / "cluster_templates"
_PLACEHOLDER = re.compile(r"\{\{([a-z_]+)\}\}")
_FIRST = {"Namespace": 0, "ConfigMap": 1}
"""What others need: a namespace is there before what lies in it, and parameters before a policy that asks for them."""
_TEXTS = frozenset({"labels", "annotations", "matchLabels", "data"})
"""Mappings whose values are text, whatever stands for them."""


def templates(folder: str) -> list[Manifest]:
    """All manifests of one folder of `cluster_templates/`, unfilled, in an order in which they can be applied."""
    files = sorted((FOLDER / folder).glob("*.yaml"))
    if not files:
        raise ValueError(f"cluster_templates has no {folder}")
    manifests = [manifest for file in files for manifest in yaml.safe_load_all(file.read_text("utf-8"))]
    return sorted(manifests, key=lambda manifest: _FIRST.get(manifest["kind"], len(_FIRST)))


def placeholders(manifest: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(name for text in _texts(manifest) for name in _PLACEHOLDER.findall(text))


def filled(manifest: Mapping[str, Any], values: Mapping[str, Any]) -> Manifest:
    """A copy without placeholders. Raises ValueError when one has no value, or a value has none: both are mistakes, and
    either could leave a wall out."""
    wanted = placeholders(manifest)
    if unknown := wanted - values.keys():
        raise ValueError(f"{_name(manifest)}: no value for {', '.join(sorted(unknown))}")
    if unused := values.keys() - wanted:
        raise ValueError(f"{_name(manifest)}: no place for {', '.join(sorted(unused))}")
    return {key: _fill(value, values, text=key in _TEXTS) for key, value in manifest.items()}


def _fill(node: Any, values: Mapping[str, Any], *, text: bool) -> Any:
    if isinstance(node, dict):
        return {key: _fill(value, values, text=text or key in _TEXTS) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, values, text=text) for value in node]
    if not isinstance(node, str):
        return node
    if (whole := _PLACEHOLDER.fullmatch(node)) and not text:
        return values[whole[1]]
    return _PLACEHOLDER.sub(lambda found: str(values[found[1]]), node)


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)


def _name(manifest: Mapping[str, Any]) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"
