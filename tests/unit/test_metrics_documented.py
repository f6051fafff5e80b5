"""Every metric is in the tables of docs/operations.md with its type and labels, and every row there is a metric."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from service.adapters.memory import MemoryStore
from service.api.metrics import ApiMetrics
from service.metrics import BuildInfo, new_registry
from service.relay.metrics import RelayMetrics, StandingCollector, WebhookMetrics
from workers.metrics import ReaperMetrics, WorkerMetrics

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
_ROW = re.compile(r"^\| `(blastdoor_\w+)` \| (\w+) \| ([\w, ]*)\|", re.MULTILINE)
_FORBIDDEN = {"tenant", "run", "run_id", "path", "name", "url"}


@dataclass(frozen=True)
class Metric:
    type: str
    labels: tuple[str, ...]


class _Recorder(CollectorRegistry):
    """Keeps what is registered: a metric with labels shows none of them before its first sample."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def register(self, collector: Any) -> None:
        super().register(collector)
        self.found.append(collector)


def _metrics(collectors: Iterable[Any]) -> Mapping[str, Metric]:
    found: dict[str, Metric] = {}
    for collector in collectors:
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            labels = collector._labelnames if isinstance(collector, MetricWrapperBase) else family._labelnames
            name = family.name + ("_total" if family.type == "counter" else "")
            assert name not in found, f"{name} is there twice"
            found[name] = Metric(family.type, tuple(labels))
    return found


def _ours(*planted: type[Any]) -> Mapping[str, Metric]:
    registry, store = _Recorder(), MemoryStore()
    for kind in (ApiMetrics, RelayMetrics, WebhookMetrics, WorkerMetrics, ReaperMetrics, *planted):
        kind(registry)
    registry.register(StandingCollector(store, store, worker_fresh=timedelta(seconds=1)))
    registry.register(BuildInfo("test"))
    return _metrics(registry.found)


def _documented(text: str) -> Mapping[str, Metric]:
    rows = _ROW.findall(text)
    assert len(rows) == len({name for name, _, _ in rows}), "a metric has two rows"
    return {name: Metric(type_, tuple(re.findall(r"\w+", labels))) for name, type_, labels in rows}


def _faults(metrics: Mapping[str, Metric]) -> list[str]:
    """By Prometheus' naming conventions, and by the promise that no stranger makes a series."""
    found = []
    for name, metric in metrics.items():
        if not re.fullmatch(r"blastdoor_[a-z]+(_[a-z]+)*", name):
            found.append(f"{name}: no name of ours")
        if (metric.type == "counter") != name.endswith("_total"):
            found.append(f"{name}: counters and nothing else end with _total")
        if ("duration" in name or metric.type == "histogram") and not name.endswith(("_seconds", "_bytes")):
            found.append(f"{name}: without its unit")
        if re.search(r"_(ms|milliseconds|minutes|kb|mib|kib)(_|$)", name):
            found.append(f"{name}: not a base unit")
        found += [f"{name}: label {label}" for label in metric.labels if label in _FORBIDDEN]
    return found


class _Undocumented:
    def __init__(self, registry: CollectorRegistry) -> None:
        Counter("blastdoor_planted_total", "Planted.", registry=registry)


def test_the_tables_are_what_the_code_counts() -> None:
    assert _documented(DOCUMENT.read_text()) == _ours()


def test_control_a_metric_without_a_row_a_row_without_a_metric_and_other_labels_are_seen() -> None:
    text, ours = DOCUMENT.read_text(), _ours()
    assert set(_ours(_Undocumented)) - set(_documented(text)) == {"blastdoor_planted_total"}
    assert _documented(text + "\n| `blastdoor_gone_total` | counter | | gone |\n") != ours
    assert _documented(text.replace("| counter | method, route, status |", "| counter | method, route |")) != ours


def test_the_names_are_by_prometheus_conventions_and_no_label_is_a_strangers_word() -> None:
    assert _faults(_ours()) == []


@pytest.mark.parametrize(
    ("kind", "name", "labels"),
    [
        (Gauge, "requests", ()),
        (Gauge, "blastdoor_things_total", ()),
        (Histogram, "blastdoor_wait", ()),
        (Histogram, "blastdoor_wait_ms", ()),
        (Counter, "blastdoor_uses_total", ("tenant",)),
        (Counter, "blastdoor_uses_total", ("path",)),
    ],
)
def test_control_a_bad_name_or_label_is_seen(kind: Any, name: str, labels: tuple[str, ...]) -> None:
    assert _faults(_metrics([kind(name, "Planted.", labels, registry=None)]))


def test_every_process_says_what_it_is() -> None:
    registry = new_registry("relay")
    assert {"blastdoor_build_info"} <= {family.name for family in registry.collect()}
