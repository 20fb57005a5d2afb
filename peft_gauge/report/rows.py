"""A run's cases as rows of a table: one for each method, model and device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from peft_gauge.report.format import step_conditions

if TYPE_CHECKING:
    from peft_gauge.history.schema import CaseRecord

PHASES = ("forward", "backward", "optimizer", "step")


def method_rows(cases: Iterable[CaseRecord]) -> list[dict[str, Any]]:
    """One row for each method × model × device, with and without gradient checkpointing, merging the metrics of all its
    passed cases."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in cases:
        metrics = case.metrics
        if "method" in metrics and case.outcome == "passed":
            key = (metrics["method"], metrics["model"], metrics["device"], _is_checkpointed(metrics))
            rows.setdefault(key, {}).update(metrics)
    return list(rows.values())


def label(row: Mapping[str, Any]) -> str:
    """The row's method, with any difference from the method's default."""
    return f"{row['method']}, checkpointing" if _is_checkpointed(row) else str(row["method"])


def _is_checkpointed(metrics: Mapping[str, Any]) -> bool:
    return bool((metrics.get("settings") or {}).get("grad_checkpointing"))


def by_model(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """``rows`` by model and device."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["device"]), []).append(row)
    return groups


def conditions(rows: list[dict[str, Any]]) -> str:
    """The step and the weights of ``rows``, which belong to one model on one device."""
    settings = rows[0].get("settings", {})
    return f"{step_conditions(settings)}, {settings.get('weights')} weights"
