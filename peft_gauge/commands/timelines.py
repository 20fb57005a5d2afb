"""``peft-gauge plan --timeline``: memory over each planned step, in the terminal or as a file."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from peft_gauge.plan.record import PlanOutcome, PlanRequest


def timelines(
    requests: Sequence[PlanRequest],
    outcomes: Sequence[PlanOutcome],
    file: Path | None,
    made: Callable[[], object] = lambda: None,
) -> dict[int, tuple[str, dict[str, Any]]]:
    """The title of each step that was planned and its timeline as JSON, by its place; saved to ``file``, if given.
    ``made`` is called after each.

    Raises `GaugeError` if the traced peak is not the planned one.
    """
    from peft_gauge.plan.planner import step_log
    from peft_gauge.plan.record import Plan
    from peft_gauge.plan.worker import quiet
    from peft_gauge.report.format import step_parts
    from peft_gauge.report.terminal.timeline_picture import columns_for
    from peft_gauge.traces.timeline import timeline

    quiet()
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    columns = columns_for(shutil.get_terminal_size().columns)
    for place, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
        if not isinstance(outcome, Plan):
            continue
        log, _ = step_log(request)
        drawn = timeline(log, columns)
        if drawn.peak.nbytes != outcome.peak_bytes:
            raise GaugeError(
                f"the timeline of {request.name} peaks at {drawn.peak.nbytes:,} bytes, its plan at "
                f"{outcome.peak_bytes:,}; this is a bug in peft-gauge: please report the command"
            )
        title = f"{request.name}, {', '.join(step_parts(outcome.settings))}"
        if file is not None:
            from peft_gauge.report.charts import timeline_plot

            data = timeline_plot.save(title, timeline(log, timeline_plot.COLUMNS).as_json(), file)
            print(f"wrote {file} and its data, {data}", file=sys.stderr)
        found[place] = title, drawn.as_json()
        made()
    return found
