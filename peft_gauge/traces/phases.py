"""Phases of a step, from marks in its log or from the stacks of its allocations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peft_gauge.memory.categories import BACKWARD, FORWARD, OPTIMIZER, OUTSIDE
from peft_gauge.traces.recording import ALLOC, FREES, Actions
from peft_gauge.traces.sites import site_of

MARK_BYTES = 333 * 512
"""The size of a mark, plus 512 per number: a size that no tensor of a transformer has."""
MARKS = (OUTSIDE, FORWARD, BACKWARD, OPTIMIZER, OUTSIDE, OUTSIDE)
"""The phase that begins at the mark of each number."""
MARK_FUNCTION = "mark"

Signed = list[tuple[int, int, int, int]]


def with_phases(
    actions: Actions, stacks: Sequence[tuple[str, ...]], told: Iterable[Sequence[Any]] | None = None
) -> tuple[Signed, list[str]]:
    """The events, without marks and with one event per free, and the phase of each."""
    begins = {} if told is None else {int(position): str(phase) for position, phase in told}
    marks = {} if told is not None else _marks(actions, stacks)
    teller = None if begins or marks else _Teller(stacks)
    events: Signed = []
    phases: list[str] = []
    phase = OUTSIDE
    requested, marked = set[int](), set[int]()  # addresses
    for position, (action, address, size, stack) in enumerate(actions):
        phase = begins.get(position, phase)
        if position in marks:
            phase = marks[position]
            marked.add(address)
        elif action == ALLOC:
            marked.discard(address)
            if teller is not None:
                phase = teller.phase(stack)
            if size:
                events.append((1, address, size, stack))
                phases.append(phase)
        elif address in requested:
            requested.discard(address)  # the completion of a free whose request is in the log
        else:
            if action == "free_requested":
                requested.add(address)
            if address not in marked:
                events.append((-1, address, size, stack))
                phases.append(phase)
    return events, phases


def _marks(actions: Actions, stacks: Sequence[tuple[str, ...]]) -> dict[int, str]:
    """Position of a mark -> the phase that begins there."""
    found = {}
    for position, (action, address, size, stack) in enumerate(actions):
        number, rest = divmod(size - MARK_BYTES, 512)
        if action != ALLOC or rest or not 0 <= number < len(MARKS):
            continue
        site = site_of(stacks[stack]) if stack >= 0 else ""
        following = actions[position + 1] if position + 1 < len(actions) else ("", -1, 0, -1)
        ends_at_once = following[0] in FREES and following[1] == address
        if ends_at_once and site.rpartition(":")[2] in (MARK_FUNCTION, ""):
            found[position] = MARKS[number]
    return found if len(found) > 1 else {}


class _Teller:
    """Determines the phase of allocations from their stacks, in order.

    Autograd runs in its own thread, whose only Python frames are those of a recomputed (checkpointed) layer or of a
    function written in Python. The next forward pass begins with the same stack as the first one.
    """

    def __init__(self, stacks: Sequence[tuple[str, ...]]) -> None:
        self._kinds = [_kind(stack) for stack in stacks]
        self._has_frames = any(stacks)
        self._phase = OUTSIDE
        self._first_of_forward: int | None = None

    def phase(self, stack: int) -> str:
        if not self._has_frames:
            return OUTSIDE
        kind = BACKWARD if stack < 0 else self._kinds[stack]
        if kind == FORWARD:
            if self._first_of_forward is None:
                self._first_of_forward = stack
            if self._phase != BACKWARD or stack == self._first_of_forward:
                self._phase = FORWARD
        elif kind == BACKWARD and self._first_of_forward is None:
            pass  # a thread without frames before the first forward pass
        elif kind is not None:
            self._phase = kind
        return self._phase


def _kind(stack: Sequence[str]) -> str | None:
    """The phase that a stack alone determines, or ``None``."""
    if not stack:
        return BACKWARD
    functions = {frame.rpartition(":")[2] for frame in stack}
    if "backward" in functions:
        return BACKWARD
    if any(frame.startswith("torch/amp/grad_scaler.py") for frame in stack):
        return BACKWARD if "scale" in functions else OPTIMIZER  # the loss is scaled, then gradients are unscaled
    if any(frame.startswith(("torch/optim/", "bitsandbytes/optim/", "torch/nn/utils/clip_grad.py")) for frame in stack):
        return OPTIMIZER
    if "_call_impl" in functions:
        return FORWARD
    return None
