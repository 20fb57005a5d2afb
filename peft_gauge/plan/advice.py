"""Changes that would make a step fit: each planned alone and together with others, ordered by cost.

The cost of a change is its floating-point operations per token, against those of the step without changes.
Dequantization, paging and smaller products also take time, which is not in this figure: only a measurement shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge import paths
from peft_gauge._internals.liger import has_liger
from peft_gauge._internals.trl import has_offloading
from peft_gauge.memory import gpus
from peft_gauge.memory.overheads import read_calibration
from peft_gauge.plan.record import Plan, PlanFailure
from peft_gauge.training.sharding import Sharding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft_gauge.plan.record import PlanOutcome, PlanRequest

MOST_COMBINED = 3
"""Changes in a combination."""

MOST_COMBINATIONS = 10
"""Planned combinations; those of the changes that save the most alone come first."""


@dataclass(frozen=True)
class Change:
    """One change of a step: its name, and the changed request, ``None`` where it is made already or impossible.
    ``same_data``: the step still trains on the same tokens. ``gpus``: how many it needs; with more than one, each
    trains on as many tokens as the one did."""

    name: str
    apply: Callable[[PlanRequest], PlanRequest | None]
    same_data: bool = True
    gpus: int = 1


@dataclass(frozen=True)
class Advice:
    """A changed step.

    ``changes``: names of the changes; ``same_data``: whether it trains on the same tokens. ``device_bytes``: as a
    plan's ``device_bytes_estimate``; ``saved_bytes``: less than the step without changes. ``flops_ratio``: operations
    per token over those of the step without changes. ``fits``: by GPU. ``tokens_per_second``: by GPU, an upper bound,
    the GPU's measured speed of a matrix product over the operations per token; only for calibrated GPUs. ``gpus``: how
    many the changed step needs; bytes and tokens per second are those of one.
    """

    changes: tuple[str, ...]
    same_data: bool
    peak_bytes: int
    device_bytes: int
    saved_bytes: int
    flops_ratio: float
    fits: dict[str, bool]
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    gpus: int = 1

    def as_json(self) -> dict[str, Any]:
        """The record for JSON."""
        return asdict(self)


def advise(
    request: PlanRequest, base: Plan, plan_all: Callable[[Sequence[PlanRequest]], Sequence[PlanOutcome]]
) -> list[Advice]:
    """The changes of ``request``, whose plan is ``base``, and their combinations: those that train on the same data
    with one GPU first, of these the cheapest, and of equal cost the fewest; then those with more GPUs. Changes that
    save nothing, or that cannot be planned, are left out.

    ``plan_all`` plans several requests.
    """
    alone = [(change, changed) for change in CHANGES if (changed := change.apply(request)) is not None]
    found = dict(zip([change for change, _ in alone], plan_all([changed for _, changed in alone]), strict=True))
    saving = {
        change: outcome
        for change, outcome in found.items()
        if isinstance(outcome, Plan) and outcome.device_bytes_estimate < base.device_bytes_estimate
    }
    rates = speeds(request)
    advice = [_advice(rates, base, (change,), outcome) for change, outcome in saving.items()]
    order = sorted(saving, key=lambda each: (not each.same_data, saving[each].device_bytes_estimate))
    together = [
        *_combinations(request, [change for change in order if change.gpus == 1]),
        *_checkpointed_on_more(request, [change for change in order if change.gpus > 1]),
    ]
    for (changes, _), outcome in zip(together, plan_all([changed for _, changed in together]), strict=True):
        if not isinstance(outcome, PlanFailure):
            assert isinstance(outcome, Plan)
            advice.append(_advice(rates, base, changes, outcome))
    return sorted(advice, key=_cost)


def _cost(advice: Advice) -> tuple[bool, int, float, int, int]:
    ratio = round(advice.flops_ratio, 2)
    return not advice.same_data, advice.gpus, ratio, len(advice.changes), advice.device_bytes


def _checkpointed_on_more(
    request: PlanRequest, changes: Sequence[Change]
) -> Iterator[tuple[tuple[Change, ...], PlanRequest]]:
    """Each number of GPUs together with gradient checkpointing, which is cheaper than more GPUs."""
    checkpointing = next(change for change in CHANGES if change.apply is _checkpointed)
    checkpointed = checkpointing.apply(request)
    for change in changes:
        changed = None if checkpointed is None else change.apply(checkpointed)
        if changed is not None:
            yield (checkpointing, change), changed


def _combinations(request: PlanRequest, changes: Sequence[Change]) -> Iterator[tuple[tuple[Change, ...], PlanRequest]]:
    """Combinations of ``changes`` that can be made together, those of the first ones first."""
    made = 0
    numbered = dict(enumerate(changes))
    for size in range(2, MOST_COMBINED + 1):
        for numbers in sorted(combinations(numbered, size), key=sum):
            chosen = tuple(numbered[number] for number in numbers)
            if any({one.name, other.name} <= group for one, other in combinations(chosen, 2) for group in EXCLUSIVE):
                continue
            changed: PlanRequest | None = request
            for change in chosen:
                changed = None if changed is None else change.apply(changed)
            if changed is not None:
                yield chosen, changed
                made += 1
                if made == MOST_COMBINATIONS * (size - 1) // (MOST_COMBINED - 1):
                    break


def _advice(rates: Mapping[str, float], base: Plan, changes: Sequence[Change], plan: Plan) -> Advice:
    def flops_per_token(each: Plan) -> float:
        settings = each.settings
        return each.flops_per_step / float(settings["batch"] * settings["seq"] * settings["grad_accumulation"])

    needed = flops_per_token(plan)
    return Advice(
        changes=tuple(change.name for change in changes),
        same_data=all(change.same_data for change in changes),
        peak_bytes=plan.peak_bytes,
        device_bytes=plan.device_bytes_estimate,
        saved_bytes=base.device_bytes_estimate - plan.device_bytes_estimate,
        flops_ratio=needed / flops_per_token(base),
        fits={fit.gpu: fit.fits for fit in plan.gpus},
        tokens_per_second={gpu: speed / needed for gpu, speed in rates.items()},
        gpus=max(change.gpus for change in changes),
    )


def speeds(request: PlanRequest) -> dict[str, float]:
    """FLOP/s of a large matrix product on each GPU of the request that `peft-gauge calibrate` has measured, by the name
    that plans give it."""
    folder = Path(request.calibration_folder) if request.calibration_folder else paths.calibrations()
    found = {}
    for gpu in request.gpus:
        speed = (read_calibration(folder, gpu) or {}).get("speed", {}).get("product_flops_per_second")
        if speed:
            found[gpus.lookup(gpu).name] = float(speed)
    return found


# --- the changes --------------------------------------------------------------------------------------------


def _checkpointed(request: PlanRequest) -> PlanRequest | None:
    if request.settings.grad_checkpointing:
        return None
    return replace(request, settings=replace(request.settings, grad_checkpointing=True))


def _with_optimizer(name: str) -> Callable[[PlanRequest], PlanRequest | None]:
    def apply(request: PlanRequest) -> PlanRequest | None:
        if "8bit" in request.settings.optimizer or not request.settings.optimizer.startswith("adamw"):
            return None
        return replace(request, settings=replace(request.settings, optimizer=name))

    return apply


def _chunked(request: PlanRequest) -> PlanRequest | None:
    return None if request.loss != "full" or request.loop == "sft" else replace(request, loss="chunked")


def _in_nf4(request: PlanRequest) -> PlanRequest | None:
    from peft_gauge.training.methods import Quantization

    method = request.method
    if method.kind != "peft" or method.quantization is not None or request.model.stored is not None:
        return None
    return replace(request, method=replace(method, quantization=Quantization(), prepare_kbit=False))


def _unprepared(request: PlanRequest) -> PlanRequest | None:
    method = request.method
    return replace(request, method=replace(method, prepare_kbit=False)) if method.prepare_kbit else None


def _in_16_bit(request: PlanRequest) -> PlanRequest | None:
    return replace(request, dtype="bfloat16") if request.dtype == "float32" else None


def _half_batch(request: PlanRequest) -> PlanRequest | None:
    settings = request.settings
    if settings.batch < 2:
        return None
    halved = replace(settings, batch=settings.batch // 2, grad_accumulation=settings.grad_accumulation * 2)
    return replace(request, settings=halved)


def _batch_of_one(request: PlanRequest) -> PlanRequest | None:
    settings = request.settings
    if settings.batch < 3:  # a batch of 2 is halved to it
        return None
    one = replace(settings, batch=1, grad_accumulation=settings.grad_accumulation * settings.batch)
    return replace(request, settings=one)


def _offloaded(request: PlanRequest) -> PlanRequest | None:
    if request.loop != "sft" or not has_offloading():
        return None
    return _with_argument(request, "activation_offloading")


def _with_liger(request: PlanRequest) -> PlanRequest | None:
    if request.loop == "plain" or not has_liger():
        return None
    return _with_argument(request, "use_liger_kernel")


def _with_argument(request: PlanRequest, name: str) -> PlanRequest | None:
    """With the trainer's argument ``name``, which is off by default."""
    given = dict(request.trainer_arguments)
    if given.get(name):
        return None
    return replace(request, trainer_arguments=tuple(sorted({**given, name: True}.items())))


def _half_sequence(request: PlanRequest) -> PlanRequest | None:
    settings = request.settings
    return replace(request, settings=replace(settings, seq=settings.seq // 2)) if settings.seq >= 4 else None


def _shared_by(gpus: int) -> Callable[[PlanRequest], PlanRequest | None]:
    def apply(request: PlanRequest) -> PlanRequest | None:
        if request.loop != "plain" or request.sharding is not None:
            return None
        return replace(request, sharding=Sharding(gpus))

    return apply


CHANGES = (
    Change("half the batch, twice the accumulation", _half_batch),
    Change("batch 1, accumulated", _batch_of_one),
    Change("chunked loss", _chunked),
    Change("8-bit AdamW", _with_optimizer("adamw8bit")),
    Change("paged 8-bit AdamW", _with_optimizer("paged-adamw8bit")),
    Change("weights in bfloat16", _in_16_bit),
    Change("no k-bit preparation", _unprepared),
    Change("base in NF4, unprepared", _in_nf4),
    Change("Liger's kernels", _with_liger),
    Change("gradient checkpointing", _checkpointed),
    Change("activation offloading", _offloaded),
    Change("half the sequence", _half_sequence, same_data=False),
    *(Change(f"{gpus} GPUs by FSDP2", _shared_by(gpus), gpus=gpus) for gpus in (2, 4, 8)),
)
"""All changes that are tried."""

EXCLUSIVE = (
    frozenset({"half the batch, twice the accumulation", "batch 1, accumulated"}),
    frozenset({"8-bit AdamW", "paged 8-bit AdamW"}),
)
"""Groups of changes that exclude each other."""
