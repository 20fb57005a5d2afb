"""The largest batch, sequence or rank that fits a GPU, or the fewest GPUs that hold a step, by bisection."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_gauge.errors import GaugeError
from peft_gauge.plan.record import Found, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from peft_gauge.plan.record import PlanRequest

SMALLEST = {"batch": 1, "seq": 2, "rank": 1}  # the loss predicts the next token, so a sequence has two
MOST_GPUS = 1024
LARGEST = 2**24  # too large for any device; ends a search without another limit
GROWTH = 1024  # a guess is at most so many times a value that fits: memory is not known to stay a line far beyond


@dataclass(frozen=True)
class Tried:
    """How far the search for the GPU number ``gpu`` of a request is (from 0): ``plans`` are made, of ``at_most`` in the
    end; ``None`` as long as nothing bounds them.

    The bound shrinks. It holds if memory grows at least half as fast beyond a value that fits as up to it: a step's
    peak is the largest of several phases' lines.
    """

    gpu: int
    plans: int
    at_most: int | None


def _ignore(plans: int, at_most: int | None) -> None:
    pass


def find(
    request: PlanRequest,
    quantity: str,
    planner: Callable[[PlanRequest], Plan],
    tell: Callable[[int, int | None], object] = _ignore,
) -> Found:
    """The largest value of ``quantity`` with which ``request`` fits its one GPU.

    ``tell`` receives the number of plans so far, and of all at most (`Tried`), before each plan.

    Assumes that a smaller value fits if a larger one does. The allocator's rounding can violate this by a step or two
    near the limit; the value found fits, and the next one does not. Raises `GaugeError` unless there is exactly one
    GPU, and if ``planner`` cannot plan the smallest step.
    """
    if len(request.gpus) != 1:
        raise GaugeError(f"searching for the largest {quantity} needs exactly one GPU; add --gpu")
    if quantity == "gpus":
        return _fewest_gpus(request, planner, tell)
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
    value, at_limit = largest_that_fits(fits, smallest, limit, room, _counting(plans, tell))
    return Found(
        quantity=quantity,
        gpu=request.gpus[0],
        value=value,
        at_limit=at_limit,
        plan=plans[smallest if value is None else value],
        tried={tried: plan.fits for tried, plan in plans.items()},
    )


def _counting(plans: Collection[int], tell: Callable[[int, int | None], object]) -> Callable[[int | None], object]:
    """A function that receives the most plans that are still to make before each, and passes on how many there are
    then; the smallest such number that still can be true."""
    known: int | None = None

    def left(most: int | None) -> None:
        nonlocal known
        found = None if most is None else len(plans) + most
        if known is None or known <= len(plans):  # one more is made now
            known = found
        elif found is not None:
            known = min(known, found)
        tell(len(plans), known)

    return left


def _fewest_gpus(
    request: PlanRequest, planner: Callable[[PlanRequest], Plan], tell: Callable[[int, int | None], object]
) -> Found:
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

    left = _counting(plans, tell)
    left(None)
    if fits(1):
        return found(1)
    usable = plans[1].gpus[0].usable_bytes
    low, high = 1, max(2, -(-plans[1].resident_bytes // usable)) if _shards(request) else 2
    while True:
        left(_most_doublings(low, high) if _shards(request) else 1)
        if fits(high):
            break
        if high >= MOST_GPUS or not _shards(request):
            return found(None)
        low, high = high, min(2 * high, MOST_GPUS)
    while high - low > 1:
        left(_most_bisections(high - low))
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return found(high)


def _shards(request: PlanRequest) -> bool:
    """Whether more GPUs leave less on each: not under DDP."""
    return request.sharding is None or request.sharding.strategy != "ddp"  # ZeRO shards at least the optimizer's state


def find_each(
    request: PlanRequest,
    quantity: str,
    planner: Callable[[PlanRequest], Plan],
    tell: Callable[[Tried], object] = lambda tried: None,
) -> list[Found]:
    """`find` for each GPU of ``request``; ``tell`` receives how far it is."""

    def of_gpu(gpu: int) -> Callable[[int, int | None], object]:
        return lambda plans, at_most: tell(Tried(gpu, plans, at_most))

    return [
        find(replace(request, gpus=(name,)), quantity, planner, of_gpu(place))
        for place, name in enumerate(request.gpus)
    ]


def largest_that_fits(
    fits: Callable[[int], bool],
    smallest: int,
    limit: int,
    room: Callable[[int], float] | None = None,
    left: Callable[[int | None], object] = lambda most: None,
) -> tuple[int | None, bool]:
    """The largest value in [``smallest``, ``limit``] for which ``fits`` holds, and whether it is ``limit`` itself;
    ``None`` if no value fits.

    ``room(value)``: the bytes left at a value that was tried. A step's memory is close to a line in its batch, sequence
    or rank, so the search begins where that line leaves nothing; without ``room`` it doubles from ``smallest``. Then it
    bisects, to the same value. ``left`` receives, before each call of ``fits``, the most calls that are still to come;
    ``None`` before a value is known that does not fit.
    """
    left(None)
    if not fits(smallest):
        return None, False
    good, bad = _enclosed(fits, smallest, limit, room, left)
    while bad - good > 1:
        left(_most_bisections(bad - good))
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good, good == limit


def _enclosed(
    fits: Callable[[int], bool],
    smallest: int,
    limit: int,
    room: Callable[[int], float] | None,
    left: Callable[[int | None], object],
) -> tuple[int, int]:
    """A value that fits, and a larger value that does not fit or is beyond ``limit``."""
    before, good, least, beyond = smallest, smallest, 0, None
    while good < limit:
        if room is None or before == good:
            value = min(2 * good, limit)
            left(None)
        else:
            value = min(max(_meets_0(before, good, room, limit), good + least), limit)
            beyond = _beyond(before, good, room, limit, beyond)
            left(None if beyond is None else _most_until_enclosed(good, least, max(beyond, value)))
            least = 2 * least or 1  # guesses that fit do not creep up to the limit
        if not fits(value):
            return _walked_down(fits, good, value, left) if room is not None else (good, value)
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


def _beyond(low: int, high: int, room: Callable[[int], float], limit: int, before: int | None) -> int | None:
    """A value that does not fit, if memory grows at least half as fast as from ``low`` to ``high``, or that is beyond
    ``limit``; at most the value found ``before``. ``None`` if memory does not grow."""
    fall = (room(low) - room(high)) / (high - low)
    if fall <= 0:
        return None
    found = min(math.floor(min(high + 2 * room(high) / fall, limit)) + 1, limit + 1)
    found = max(found, high + 1)
    return found if before is None or before <= high else min(found, before)


def _walked_down(
    fits: Callable[[int], bool], good: int, bad: int, left: Callable[[int | None], object]
) -> tuple[int, int]:
    """Closer bounds: from ``bad`` down in steps that double, since ``bad`` is near the limit."""
    step = max(1, bad // 128)
    while bad - good > 1:
        left(_most_on_a_walk(good, bad, step))
        value = max(bad - step, good + 1)
        if fits(value):
            return value, bad
        bad, step = value, 2 * step
    return good, bad


def _most_bisections(width: int) -> int:
    """The most values to try between a value that fits and one ``width`` above that does not."""
    return (width - 1).bit_length()


def _most_on_a_walk(good: int, bad: int, step: int) -> int:
    """The most values that `_walked_down` and the bisection after it try."""
    walked = most = 0
    while bad - good > 1:
        value = max(bad - step, good + 1)
        walked += 1
        most = max(most, walked + _most_bisections(bad - value))
        bad, step = value, 2 * step
    return max(most, walked)


def _most_until_enclosed(good: int, least: int, beyond: int) -> int:
    """The most values that `_enclosed` and the searches after it try above ``good`` if ``beyond`` does not fit, and the
    next guess is at least ``least`` above ``good``."""
    guesses = most = 0
    while good < beyond:
        guesses += 1
        most = max(most, guesses + _most_on_a_walk(good, beyond, 1))
        good, least = good + max(least, 1), 2 * least or 1
    return most


def _most_doublings(low: int, high: int) -> int:
    """The most numbers of GPUs that are tried from ``high`` on, if ``low`` do not hold the step."""
    doublings = most = 0
    while True:
        doublings += 1
        most = max(most, doublings + _most_bisections(high - low))
        if high >= MOST_GPUS:
            return most
        low, high = high, min(2 * high, MOST_GPUS)


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
