"""The Python interface: `plan`, `compare` and `read_run`, importable from ``peft_gauge`` itself.

>>> import peft_gauge as pg
>>> step = pg.plan("llama-2-7b", "qlora", batch=1, seq=512, gpu="RTX 4090")  # doctest: +SKIP
>>> step.fits, step.peak_bytes  # doctest: +SKIP
(True, 9906575872)

Strings mean what they mean on the command line. In a notebook, a plan shows itself as a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    import pandas

    from peft_gauge.plan.record import Plan

__all__ = ["compare", "plan", "read_run"]


def plan(
    model: str | Path,
    method: str | Path = "lora",
    *,
    batch: int = 4,
    seq: int = 768,
    dtype: str | None = None,
    gpu: str | Sequence[str] = (),
    gpus: int = 1,
    nodes: int = 1,
    strategy: str = "fsdp2",
    loop: str = "plain",
    arguments: Mapping[str, Any] | None = None,
    quantize: str | None = None,
    peft_config: Mapping[str, Any] | None = None,
    optimizer: str | None = None,
    grad_checkpointing: bool | None = None,
    grad_accumulation: int | None = None,
    clip_grad_norm: float | None = None,
    mixed_precision: str | None = None,
    attention: str | None = None,
    loss: str = "full",
    padded: bool = False,
) -> Plan:
    """The memory of a training step, predicted without a GPU; the options of ``peft-gauge plan`` by their names.

    Args:
        model: a record's name, a folder or file with a config, or a Hub id.
        method: a method's name, or the path of an ``adapter_config.json`` or its folder.
        gpu: names or sizes of GPUs to hold the step against, such as ``"RTX 4090"`` or ``"24GB"``.
        gpus, nodes, strategy: several GPUs that share the step.
        arguments: of ``TrainingArguments`` or ``SFTConfig``, for ``loop`` ``"trainer"`` or ``"sft"``.
        peft_config: settings of the adapter that differ, such as ``{"r": 64, "target_modules": "all-linear"}``.

    Raises `GaugeError` for input that cannot be planned, in one line.
    """
    from peft_gauge.commands.plan_step import adjusted, described_step, in_stored_dtype
    from peft_gauge.memory.gpus import lookup
    from peft_gauge.plan.planner import plan as planned
    from peft_gauge.plan.record import PlanRequest
    from peft_gauge.training import methods, models
    from peft_gauge.training.sharding import Sharding

    cards = (gpu,) if isinstance(gpu, str) else tuple(gpu)
    for name in cards:
        lookup(name)
    given = {
        "loop": loop,
        "batch": batch,
        "seq": seq,
        "optimizer": optimizer,
        "grad_checkpointing": grad_checkpointing,
        "grad_accumulation": grad_accumulation,
        "clip_grad_norm": clip_grad_norm,
        "mixed_precision": mixed_precision,
        "dtype": dtype,
        "attention": attention,
        "loss": loss,
    }
    step = described_step({name: value for name, value in given.items() if value is not None}, None, arguments or {})
    record = models.resolve(str(model))
    known = isinstance(method, str) and method in methods.METHODS
    chosen = (
        methods.get(str(method)) if known or not Path(method).exists() else methods.from_adapter_config(Path(method))
    )
    if peft_config:
        if chosen.kind != "peft":
            raise GaugeError(f"{chosen.name} has no PEFT config; leave out peft_config")
        chosen = chosen.variant(chosen.name, chosen.title, peft_config=dict(peft_config))
    sharding = Sharding(gpus, strategy, nodes) if gpus * nodes > 1 else None  # type: ignore[arg-type]
    request = PlanRequest(
        model=record,
        method=adjusted(chosen, quantize, None, None, None),
        padded=padded,
        sharding=sharding,
        gpus=cards,
        **in_stored_dtype(step, record),
    )
    return planned(request)


def read_run(path: str | Path) -> pandas.DataFrame:
    """A saved run as a frame with one row per number: ``case``, ``benchmark``, ``outcome``, ``metric`` and ``value``.

    Numbers within a metric have its name and their keys joined by dots, such as ``phase_seconds.forward``. A case
    without numbers, such as a skipped one, has one row with an empty metric. ``attrs`` of the frame has the run's
    ``machine``, ``commit``, ``when`` and ``libraries``. Raises `GaugeError` for a file that holds no run.
    """
    import pandas

    from peft_gauge.history.reader import read_run as read

    run = read(Path(path))
    without: list[tuple[str | None, float | None]] = [(None, None)]
    rows = [
        {"case": case.id, "benchmark": case.benchmark, "outcome": case.outcome, "metric": metric, "value": value}
        for case in run.cases
        for metric, value in _numbers("", case.metrics) or without
    ]
    frame = pandas.DataFrame(rows, columns=["case", "benchmark", "outcome", "metric", "value"])
    frame.attrs = {
        "machine": dict(run.machine),
        "commit": dict(run.commit),
        "when": run.when.isoformat(),
        "libraries": dict(run.libraries),
    }
    return frame


def _numbers(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [each for key, inner in value.items() for each in _numbers(f"{name}.{key}" if name else str(key), inner)]
    return [(name, value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def compare(base: str | Path, new: str | Path, *, across_machines: bool = False) -> pandas.DataFrame:
    """Two saved runs compared by ``fixtures/rules.toml``, the worst first: a row per metric of a case.

    Columns: ``case``, ``metric``, ``verdict`` (same, better, worse or inconclusive), ``label`` (such as NEW or
    MISSING), ``before``, ``after``, ``ratio``, ``cause`` and ``note``. ``attrs`` has the comparison's ``notes``. Raises
    `GaugeError` if the runs cannot be compared; ``across_machines`` compares deterministic metrics of different ones.
    """
    import pandas

    from peft_gauge.history.comparison import compare as compared
    from peft_gauge.history.reader import read_run as read
    from peft_gauge.history.rules import read_rules

    found = compared(read(Path(base)), read(Path(new)), read_rules(), across_machines=across_machines)
    if found.incomparable is not None:
        raise GaugeError(f"these runs cannot be compared: {found.incomparable}")
    columns = ["case", "metric", "verdict", "label", "before", "after", "ratio", "cause", "note"]
    rows = [
        {"case": row.test, **{name: getattr(row, name) for name in columns[1:]}}
        for row in sorted(found.rows, key=lambda row: row.badness)
    ]
    frame = pandas.DataFrame(rows, columns=columns)
    frame.attrs = {"notes": list(found.notes)}
    return frame
