"""The largest batch, sequence or rank that fits a GPU, or the fewest GPUs that hold a step, by bisection."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from peft_gauge.errors import GaugeError
from peft_gauge.plan.record import Found, Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft_gauge.plan.record import PlanRequest

SMALLEST = {"batch": 1, "seq": 2, "rank": 1}  # the loss predicts the next token, so a sequence has two
MOST_GPUS = 1024
LARGEST = 2**24  # too large for any device; ends a search without another limit
GROWTH = 1024  # a guess is at most so many times a value that fits: memory is not known to stay a line far beyond


def find(request: PlanRequest, quantity: str, planner: Callable[[PlanRequest], Plan]) -> Found:
    """The largest value of ``quantity`` with which ``request`` fits its one GPU.

    Assumes that a smaller value fits if a larger one does. The allocator's rounding can violate this by a step or two
    near the limit; the value found fits, and the next one does not. Raises `GaugeError` unless there is exactly one
    GPU, and if ``planner`` cannot plan the smallest step.
    """
    if len(request.gpus) != 1:
        raise GaugeError(f"searching for the largest {quantity} needs exactly one GPU; add --gpu")
    if quantity == "gpus":
        return _fewest_gpus(request, planner)
    plans: dict[int, Plan] = {}

    def fits(value: int) -> bool:
        plans[value] = planner(request.with_value(quantity, value))
        return plans[value].fits

    def room(value: int) -> float:
        """Cached blocks count as left: the allocator releases them before a step fails."""
        found = plans[value]
        outside_bytes = found.device_bytes_estimate - found.reserved_bytes_estimate
        return found.gpus[0].usable_bytes - outside_bytes - found.allocated_bytes_estimate

    smallest, limit = SMALLEST[quantity], _limit(request, quantity)
    value, at_limit = largest_that_fits(fits, smallest, limit, room)
    return Found(
        quantity=quantity,
        gpu=request.gpus[0],
        value=value,
        at_limit=at_limit,
        plan=plans[smallest if value is None else value],
        tried={tried: plan.fits for tried, plan in plans.items()},
    )


def _fewest_gpus(request: PlanRequest, planner: Callable[[PlanRequest], Plan]) -> Found:
    """The fewest GPUs (on each node) whose ranks hold ``request``'s step.

    Assumes that more GPUs hold what fewer do. One rank's share of the memory between steps bounds the search from
    below; what a rank holds alone (activations, gathered blocks) can exceed a GPU however many there are.
    """
    plans: dict[int, Plan] = {}

    def fits(number: int) -> bool:
        plans[number] = planner(request.with_value("gpus", number))
        return plans[number].fits

    def found(value: int | None) -> Found:
        tried = {number: plan.fits for number, plan in plans.items()}
        return Found("gpus", request.gpus[0], value, False, plans[value or max(plans)], tried)

    if fits(1):
        return found(1)
    usable = plans[1].gpus[0].usable_bytes
    low, high = 1, max(2, -(-plans[1].resident_bytes // usable)) if _shards(request) else 2
    while not fits(high):
        if high >= MOST_GPUS or not _shards(request):
            return found(None)
        low, high = high, min(2 * high, MOST_GPUS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return found(high)


def _shards(request: PlanRequest) -> bool:
    """Whether more GPUs leave less on each: not under DDP."""
    return request.sharding is None or request.sharding.strategy != "ddp"  # ZeRO shards at least the optimizer's state


def find_each(request: PlanRequest, quantity: str, planner: Callable[[PlanRequest], Plan]) -> list[Found]:
    """`find` for each GPU of ``request``."""
    search = partial(find, quantity=quantity, planner=planner)
    return [search(replace(request, gpus=(gpu,))) for gpu in request.gpus]


def largest_that_fits(
    fits: Callable[[int], bool], smallest: int, limit: int, room: Callable[[int], float] | None = None
) -> tuple[int | None, bool]:
    """The largest value in [``smallest``, ``limit``] for which ``fits`` holds, and whether it is ``limit`` itself;
    ``None`` if no value fits.

    ``room(value)``: the bytes left at a value that was tried. A step's memory is close to a line in its batch, sequence
    or rank, so the search begins where that line leaves nothing; without ``room`` it doubles from ``smallest``. Then it
    bisects, to the same value.
    """
    if not fits(smallest):
        return None, False
    good, bad = _enclosed(fits, smallest, limit, room)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, good == limit


def _enclosed(
    fits: Callable[[int], bool], smallest: int, limit: int, room: Callable[[int], float] | None
) -> tuple[int, int]:
    """A value that fits, and a larger value that does not fit or is beyond ``limit``."""
    before, good = smallest, smallest
    while good < limit:
        value = min(2 * good, limit) if room is None or before == good else _meets_0(before, good, room, limit)
        if not fits(value):
            return _walked_down(fits, good, value) if room is not None else (good, value)
        before, good = good, value
    return good, limit + 1


def _meets_0(low: int, high: int, room: Callable[[int], float], limit: int) -> int:
    """The value above ``high`` at which the line through ``low`` and ``high`` leaves nothing, `GROWTH` times ``high``
    and ``limit`` at most."""
    most = min(GROWTH * high, limit)
    fall = (room(low) - room(high)) / (high - low)
    if fall <= 0:
        return most
    return min(max(math.floor(high + min(room(high) / fall, most)), high + 1), most)


def _walked_down(fits: Callable[[int], bool], good: int, bad: int) -> tuple[int, int]:
    """Closer bounds: from ``bad`` down in steps that double, since ``bad`` is near the limit."""
    step = max(1, bad // 128)
    while bad - good > 1:
        value = max(bad - step, good + 1)
        if fits(value):
            return value, bad
        bad, step = value, 2 * step
    return good, bad


def _limit(request: PlanRequest, quantity: str) -> int:
    if quantity == "seq":
        return request.model.max_positions or LARGEST
    if quantity == "rank":
        return _largest_rank(request)
    return LARGEST


def _largest_rank(request: PlanRequest) -> int:
    """The largest rank that a matrix of the model can have (`peft_gauge.training.methods` rejects more)."""
    from peft_gauge.training import models, targets

    model = models.build(request.model, device="meta")
    return max((min(targets.sizes(linear)) for linear in targets.linear_layers(model).values()), default=LARGEST)
