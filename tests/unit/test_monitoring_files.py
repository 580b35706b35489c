"""The dashboards, the rules and the table of metrics speak of metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from muai_producers.monitoring.instruments import BY_NAME, INSTRUMENTS
from muai_producers.monitoring.reference import with_table

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "config/grafana/dashboards").glob("*.json"))
RULES: dict[str, Any] = yaml.safe_load((ROOT / "config/prometheus/rules.yml").read_text(encoding="utf-8"))
DOCUMENT = ROOT / "docs/monitoring.md"
WORDS = {"sum", "by", "rate", "increase", "max", "topk", "on", "and", "or", "absent", "up", "le", "histogram_quantile"}
SPECIFIED = {
    "inference_latency_seconds": ("histogram", {"model", "engine"}),
    "inference_requests_total": ("counter", {"model", "engine", "status"}),
    "throughput_requests_per_second": ("gauge", {"model"}),
    "gpu_memory_used_bytes": ("gauge", {"gpu_id"}),
    "cpu_usage_percent": ("gauge", set()),
    "kv_cache_hit_rate": ("gauge", {"model"}),
    "batch_size": ("histogram", {"model"}),
}


def queries() -> list[str]:
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    return expressions + [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]


def metrics_of(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", expression)
    names = set(re.findall(r"[a-z][a-z0-9_]{2,}", bare)) - WORDS
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name not in BY_NAME else name for name in names}


def test_given_the_specifications_metrics_then_each_has_its_name_kind_and_labels() -> None:
    for name, (kind, labels) in SPECIFIED.items():
        assert BY_NAME[name].kind == kind
        assert labels <= set(BY_NAME[name].labels)
        assert set(BY_NAME[name].labels) - labels <= {"host"}


@pytest.mark.parametrize("expression", queries())
def test_given_a_query_of_dashboards_or_rules_then_its_metrics_and_labels_exist(expression: str) -> None:
    labels = {label for one in INSTRUMENTS for label in one.labels} | {"job"}
    named = metrics_of(expression) - labels
    assert named <= set(BY_NAME)
    assert named or "up{" in expression


def test_given_every_metric_then_a_panel_shows_it() -> None:
    shown = {name for expression in queries() for name in metrics_of(expression)}
    assert set(BY_NAME) <= shown


def test_given_a_dashboard_then_grafana_can_tell_it_from_the_others() -> None:
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS]
    assert len({document["uid"] for document in documents}) == len(documents) == 5
    for document in documents:
        assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])


def test_given_a_rule_then_it_says_how_grave_it_is_and_what_to_do() -> None:
    for group in RULES["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert rule["annotations"]["summary"]


def test_given_the_document_then_its_table_is_that_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_table(text) == text, "make docs writes it anew"
