"""Rows of one saved run for the page and its plots: memory, times and sweeps; bytes and seconds are unrounded.

A row can be filtered by its ``method``, ``model`` and ``machine``. Rows of one ``panel`` share a plot; ``where`` names
the step that was measured or planned: its model, device, shape and machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from peft_gauge.history.metrics import is_number
from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES
from peft_gauge.medians import median_interval
from peft_gauge.report.format import step_conditions
from peft_gauge.report.html import tasks
from peft_gauge.report.html.page_history import machine_of, subject_of
from peft_gauge.report.rows import PHASES, label, method_rows
from peft_gauge.report.terminal.memory_table import ON_CPU, ON_CUDA, planned_bytes
from peft_gauge.report.terminal.sweep_table import ABOUT_QUALITY, swept

if TYPE_CHECKING:
    from peft_gauge.history.reader import Run
    from peft_gauge.history.schema import CaseRecord

Row = dict[str, Any]


def _of_method(run: Run, metrics: Mapping[str, Any]) -> Row:
    return {"machine": machine_of(run), "model": None, "method": None} | subject_of(metrics)


def plans_of(run: Run) -> Iterator[Mapping[str, Any]]:
    """All planned steps among the cases of ``run``."""
    for case in run.cases:
        plan = case.metrics.get("plan")
        if isinstance(plan, Mapping) and {"model", "method", "peak_bytes", "settings"} <= plan.keys():
            yield plan


def methods_told(runs: Sequence[Run], *, memory: bool = False) -> list[Row]:
    """A merged row of metrics for each method that was counted or timed, separated by the way it was trained.

    Metrics with equal settings are merged over ``runs``, newest first; ``run`` names all runs of a row. With
    ``memory``, a method whose memory was measured has a row as well.
    """
    told = {"trainable_params", *(f"{phase}_seconds" for phase in PHASES), *(["tensor_peak_bytes"] if memory else [])}
    by_settings: dict[str, list[tuple[Run, CaseRecord]]] = {}
    for run in reversed(runs):
        for case in run.cases:
            if told & case.metrics.keys() and "method" in case.metrics and case.outcome == "passed":
                by_settings.setdefault(_settings_of(case), []).append((run, case))
    rows = []
    for records in by_settings.values():
        for row in method_rows(case for _, case in records):
            of_row = [run.name for run, case in records if _is_of(row, case)]
            rows.append(row | {"run": ", ".join(reversed(dict.fromkeys(of_row)))})
    return rows


def _settings_of(case: CaseRecord) -> str:
    return json.dumps(case.metrics.get("settings"), sort_keys=True, default=str)


def _is_of(row: Row, case: CaseRecord) -> bool:
    (own,) = method_rows([case])
    return label(own) == label(row) and all(own[name] == row[name] for name in ("model", "device"))


def measured_steps(run: Run) -> list[Row]:
    """A merged row of metrics for each method whose memory was measured, separated by the way it was trained."""
    return [row for row in method_rows(run.cases) if row.get("tensor_peak_bytes") is not None]


def memory_rows(run: Run) -> Iterator[Row]:
    """Bytes by category at the peak, for measured and for planned steps."""
    for row in measured_steps(run):
        yield from _categories(run, row, step_of(run, row), label(row), "measured")
    for plan in plans_of(run):
        yield from _categories(run, plan, step_of(run, plan), planned_label(plan), "planned")


def step_of(run: Run, metrics: Mapping[str, Any]) -> str:
    """The step that ``metrics`` describe: model, device ("planned" for a plan), shape, data type and machine."""
    device = metrics.get("device")
    how = f"{metrics['model']} on {device}" if isinstance(device, str) else f"{metrics['model']}, planned"
    return f"{how}, {step_conditions(metrics.get('settings') or {})}, {machine_of(run)}"


def _categories(run: Run, about: Mapping[str, Any], where: str, name: str, source: str) -> Iterator[Row]:
    about_it = {**_of_method(run, about), "panel": where, "where": where, "label": name, "source": source}
    for category, size in (about.get("peak_by_category") or {}).items():
        if size:
            yield {**about_it, "category": category, "bytes": size}


def planned_label(plan: Mapping[str, Any]) -> str:
    """The method of ``plan``, with checkpointing if it has that."""
    checkpointing = ", checkpointing" if plan["settings"].get("grad_checkpointing") else ""
    return f"{plan['method']}{checkpointing}"


def planned_rows(run: Run) -> Iterator[Row]:
    """By method and meter: measured peak, planned peak, ceiling (``None`` on a CPU), and relative error."""
    for row in measured_steps(run):
        where = step_of(run, row)
        for meter, (measured, planned) in (ON_CUDA if row["device"] == "cuda" else ON_CPU).items():
            planned_metric = planned_bytes(row, planned)
            if row.get(measured) is None or planned_metric is None:
                continue
            yield {
                **_of_method(run, row),
                "panel": where,
                "where": where,
                "label": f"{label(row)}, {meter}",
                "meter": meter,
                "measured_bytes": row[measured],
                "planned_bytes": planned_metric,
                "ceiling_bytes": (row.get("ceiling") or {}).get(measured),
                "relative_error": (row.get("relative_error") or {}).get(measured),
            }


def sequence_rows(run: Run) -> Iterator[Row]:
    """Peaks at several sequence lengths, all else equal, planned and measured; single lengths are left out."""
    points = [*_planned_points(run), *_measured_points(run)]
    lengths: dict[tuple[str, str, str], set[int]] = {}
    for point in points:
        lengths.setdefault(_line(point), set()).add(point["seq"])
    seen = set()
    for point in points:
        key = (*_line(point), point["seq"])
        if len(lengths[_line(point)]) > 1 and key not in seen:
            seen.add(key)
            yield point


def _line(point: Row) -> tuple[str, str, str]:
    return point["panel"], point["label"], point["source"]


def _planned_points(run: Run) -> Iterator[Row]:
    for plan in plans_of(run):
        settings = plan["settings"]
        yield _point(
            run, plan, planned_label(plan), "planned", settings.get("batch"), settings.get("seq"), plan["peak_bytes"]
        )
    for case in run.cases:
        by_seq = case.metrics.get("peak_bytes_by_seq")
        if not isinstance(by_seq, Mapping):
            continue
        model = case.id.partition("[")[2].rstrip("]") or "a model"  # such a case covers one model and many methods
        for seq, peaks in by_seq.items():
            for method, size in peaks.items():
                yield _point(run, {"model": model, "method": method}, method, "planned", 1, int(seq), size)


def _measured_points(run: Run) -> Iterator[Row]:
    for row in measured_steps(run):
        peak = "allocated_peak_bytes" if row["device"] == "cuda" else "tensor_peak_bytes"
        for shape in row.get("shapes") or []:
            if shape.get(peak) is not None:
                yield _point(run, row, label(row), "measured", shape["batch"], shape["seq"], shape[peak])


def _point(run: Run, about: Mapping[str, Any], name: str, source: str, batch: object, seq: object, size: int) -> Row:
    device = f" on {about['device']}" if isinstance(about.get("device"), str) else ""
    panel = f"{about['model']}{device}, batch {batch}, {machine_of(run)}"
    return {
        **_of_method(run, about),
        "panel": panel,
        "where": panel,
        "label": name,
        "source": source,
        "seq": seq,
        "bytes": size,
    }


def growth_rows(run: Run) -> Iterator[Row]:
    """Growth of the peak per token and per row, measured and planned."""
    for row in method_rows(run.cases):
        for line in row.get("growth") or []:
            yield {**_of_method(run, row), "label": label(row), "metric": row.get("growth_of"), **line}


def time_rows(run: Run) -> Iterator[Row]:
    """Each time of a passed case in seconds: the saved median, and a 95 % interval of the median of its rounds.

    The same for its ratio to the control, the forward pass of the bare base model before each round, if it has one.
    """
    for record in run.cases:
        if record.outcome != "passed":
            continue
        for metric, value in record.metrics.items():
            if _is_measured_time(metric, record) and is_number(value):
                yield _time(run, record, metric, value)


def _is_measured_time(metric: str, record: CaseRecord) -> bool:
    """Whether it is a time of the case itself: one with samples, or, in a run without samples, named after a phase."""
    samples = record.metrics.get(SAMPLES)
    if samples is not None:
        return metric in samples
    return metric in ("seconds", *(f"{phase}_seconds" for phase in ("forward", "backward", "optimizer", "step")))


def _time(run: Run, record: CaseRecord, metric: str, value: float) -> Row:
    metrics = record.metrics
    processes = (metrics.get(SAMPLES) or {}).get(metric) or []
    low, high = median_interval(list(chain.from_iterable(processes))) or (None, None)
    ratio_low, ratio_high = over_control_interval(metrics, metric) or (None, None)
    about = _of_method(run, metrics)
    is_method = metrics.get("method") is not None
    what, where = metric.removesuffix("_seconds"), step_of(run, metrics) if is_method else about["machine"]
    return {
        **about,
        "panel": f"{what}, {where}",
        "where": where,
        "label": label(metrics) if is_method else _short(record.id),
        "metric": metric,
        "seconds": value,
        "low_seconds": low,
        "high_seconds": high,
        "rounds": sum(map(len, processes)),
        "processes": len(processes),
        "over_control": metrics.get(metric.replace("_seconds", "_over_control")),
        "over_control_low": ratio_low,
        "over_control_high": ratio_high,
        "unsteady": "; ".join(map(str, metrics.get("unsteady") or [])) or None,
    }


def over_control_interval(metrics: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """A 95 % interval of the median ratio of ``metric`` to its control, round by round; ``None`` without enough."""
    times, controls = ((metrics.get(name) or {}).get(metric) or [] for name in (SAMPLES, CONTROL_SAMPLES))
    if [*map(len, times)] != [*map(len, controls)]:
        return None
    pairs = zip(chain.from_iterable(times), chain.from_iterable(controls), strict=True)
    return median_interval([time / control for time, control in pairs if control > 0])


def _short(test: str) -> str:
    """The parameters of a test's id, or all of it without any."""
    return test.partition("[")[2].rstrip("]") or test.removeprefix("benchmarks/")


def sweep_rows(run: Run) -> Iterator[Row]:
    """The points of every sweep in ``run``, as from `pareto_rows`."""
    for record in swept(run.cases):
        yield from pareto_rows(run, record)


def pareto_rows(run: Run, record: CaseRecord) -> Iterator[Row]:
    """Points of a saved sweep: quality (higher is better) against each cost (lower is better) that separates points.

    ``task``: the sweep in words; ``quality_is``: its quality in words. ``front``: no other point of the sweep has at
    most this cost and higher quality, or lower cost and equal quality. A point without a quality, whose training
    diverged, is not on the front. ``unsteady``: why its quality is uncertain: one seed, or seeds that diverged.
    """
    points = record.metrics.get("pareto") or []
    quality = record.metrics.get("quality_is") or "quality"
    task = tasks.question(record)
    for cost in tasks.costs(points):
        swept = [point for point in points if is_number(point.get(cost))]
        known = [point for point in swept if is_number(point.get("quality"))]
        for point in swept:
            yield {
                **_of_method(run, record.metrics),
                "test": record.id.removeprefix("benchmarks/"),
                "task": task,
                "panel": f"{task}: {quality} against {tasks.cost_words(cost)}, {machine_of(run)}",
                "label": str(point.get("label")),
                "cost": cost,
                "value": point[cost],
                "quality_is": quality,
                **{name: point.get(name) for name in sorted(ABOUT_QUALITY)},
                "unsteady": _unsure(point),
                "front": point in known and not any(_dominates(other, point, cost) for other in known),
            }


def _unsure(point: Mapping[str, Any]) -> str | None:
    seeds, diverged = point.get("seeds"), point.get("diverged") or 0
    if diverged:
        return f"{diverged} of {seeds} seeds diverged"
    return "one seed" if seeds == 1 else None


def _dominates(other: Mapping[str, Any], point: Mapping[str, Any], cost: str) -> bool:
    no_worse = other[cost] <= point[cost] and other["quality"] >= point["quality"]
    return bool(no_worse and (other[cost] < point[cost] or other["quality"] > point["quality"]))
