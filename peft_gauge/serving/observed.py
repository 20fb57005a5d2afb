"""What is observed of a server: outputs that come back or do not, what an adapter's stay and a merge leave behind.

Shapes: token ids (rows, seq), logits (rows, seq, vocabulary).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge import identity
from peft_gauge.clock import timed
from peft_gauge.clock.rounds import Rounds, StoppingRule, Stopwatch, WarmUp
from peft_gauge.clock.rounds import measure as measure_rounds
from peft_gauge.identity import Bounded, IdentityCheck, LoraCase
from peft_gauge.serving.server import BASE

if TYPE_CHECKING:
    from torch import Tensor

    from peft_gauge.serving.server import Server

CHECKED_LAYERS = 4
"""Layers that are held against `identity`'s bounds; the float64 arithmetic of all of them would take minutes."""

TOLERANCE = 10
"""How many times the measured rounding error a mixed batch may be off."""


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most ``most`` of ``names``, the first and the last among them, evenly between."""
    if len(names) <= most:
        return list(names)
    return [names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)]


@dataclass(frozen=True)
class Visits:
    """The outputs of a round through adapters (and the base, `BASE`), and how many came back in a second round.

    ``outputs``: logits by adapter; ``returned``: those that the second round gave again, to the last bit.
    """

    outputs: dict[str, Tensor]
    returned: tuple[str, ...]

    @property
    def least_difference(self) -> float:
        """The largest absolute difference between the logits of the two adapters that are nearest to each other."""
        return min(max_error(a, b) for a, b in itertools.combinations(self.outputs.values(), 2))


def visit(server: Server, ids: Tensor, names: Sequence[str]) -> Visits:
    """Switch through the base and ``names`` twice, so that every one is left and come back to."""

    def output(name: str) -> Tensor:
        if name == BASE:
            return server.base_logits(ids)
        server.switch(name)
        return server.logits(ids)

    first = {name: output(name) for name in (BASE, *names)}
    return Visits(first, tuple(name for name in first if torch.equal(output(name), first[name])))


def max_error(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape."""
    return float((a.float() - b.float()).abs().max())


@dataclass(frozen=True)
class Mixing:
    """A mixed batch against what each adapter gives alone.

    ``max_error``: the largest difference; ``rounding_error``: the most that the same rows through the same adapter
    differ between one batch and one row at a time, where only the order of sums changes; it is no less than one unit of
    rounding of the largest logit. ``least_difference``: that of any two adapters (`Visits`).
    """

    max_error: float
    rounding_error: float
    least_difference: float

    @property
    def holds(self) -> bool:
        """Whether the batch is within `TOLERANCE` of rounding, and that is less than from one adapter to another."""
        tolerance = TOLERANCE * self.rounding_error
        return self.max_error <= tolerance < self.least_difference


def mix(server: Server, ids: Tensor, names: Sequence[str], alone: Visits) -> Mixing:
    """One batch of ``ids``, row by row through ``names``, against the same rows of what was visited ``alone``."""
    mixed = server.mixed_logits(ids, names)
    expected = torch.stack([alone.outputs[name][row] for row, name in enumerate(names)])
    rounding = torch.finfo(expected.dtype).eps * float(expected.abs().max())
    for row, name in enumerate(names):
        if name != BASE:
            server.switch(name)
            rounding = max(rounding, max_error(server.logits(ids[row : row + 1])[0], expected[row]))
    return Mixing(max_error(mixed, expected), rounding, alone.least_difference)


def time_switches(server: Server, ids: Tensor, rule: StoppingRule, warm_up: WarmUp) -> Rounds:
    """Time switches from each adapter to the next; before each, a forward of ``ids`` as the control."""
    turn = itertools.cycle(server.names)
    return measure_rounds(
        lambda: server.switch(next(turn)),
        lambda: None,
        Stopwatch(server.device),
        rule,
        control=lambda: server.logits(ids),
        warm_up=warm_up,
    )


@dataclass(frozen=True)
class Turnover:
    """An adapter that was written, loaded under another name, and deleted again.

    ``disk_bytes``: its safetensors; ``load_seconds``: wall time of reading and adding it; ``same``: its output was the
    original's to the last bit; ``kept_bytes``: what its stay left behind.
    """

    disk_bytes: int
    load_seconds: float
    same: bool
    kept_bytes: int


def turn_over(server: Server, ids: Tensor, name: str) -> Turnover:
    """Save the adapter called ``name``, load it again beside itself, and delete that copy."""
    before_bytes = server.adapters_bytes
    with tempfile.TemporaryDirectory(prefix="peft-gauge-") as place:
        folder = server.save(name, Path(place))
        disk_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        load_seconds = timed(lambda: server.load(folder, "reloaded"))
    server.switch(name)
    original = server.logits(ids)
    server.switch("reloaded")
    same = torch.equal(server.logits(ids), original)
    server.switch(name)
    server.delete("reloaded")
    return Turnover(disk_bytes, load_seconds, same, server.adapters_bytes - before_bytes)


@dataclass(frozen=True)
class Merging:
    """Merging the active adapter and unmerging it.

    ``max_error``: of the merged model's logits against the unmerged one's; ``drifts``: after each cycle of merge and
    unmerge, the largest distance of a base weight from where it began; ``weight_size``: the largest base weight;
    ``outputs`` and ``restored``: some layers' outputs, and weights after the first cycle, against the rounding-error
    bounds, empty for a quantised base, which quantises anew.
    """

    max_error: float
    drifts: tuple[float, ...]
    weight_size: float
    outputs: tuple[IdentityCheck, ...]
    restored: tuple[IdentityCheck, ...]


def merge_cycles(server: Server, ids: Tensor, cycles: int) -> Merging:
    """Merge the active adapter and take it off again, ``cycles`` times; the base keeps what that changes."""
    layers = server.layers()
    start = {name: _weight(layer).clone() for name, layer in layers.items()}
    exact = server.method.quantization is None
    checked = spread(list(layers), CHECKED_LAYERS) if exact else []
    with identity.full_precision(), torch.no_grad():
        before, inputs = _with_inputs(server, ids, {name: layers[name] for name in checked})
        cases = {name: _lora_case(layers[name], inputs[name]) for name in checked}
        unmerged = {name: layers[name](case.x) for name, case in cases.items()}
        server.merge()
        error = max_error(server.logits(ids), before)
        outputs = [
            each for name, case in cases.items() for each in _merged_layer(case, layers[name](case.x), unmerged[name])
        ]
        server.unmerge()
        restored = [_restored(layers[name], case) for name, case in cases.items()]
        drifts = [_drift(layers, start)]
        for _ in range(cycles - 1):
            server.merge()
            server.unmerge()
            drifts.append(_drift(layers, start))
    size = max(float(weight.abs().max()) for weight in start.values())
    return Merging(error, tuple(drifts), size, tuple(outputs), tuple(restored))


def _weight(layer: Any) -> Tensor:
    """A LoRA layer's base weight, dequantised where it is packed."""
    weight: Tensor = layer.get_base_layer().weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    dequantised: Tensor = dequantize_4bit(weight.data, state)
    return dequantised


def _drift(layers: dict[str, Any], start: dict[str, Tensor]) -> float:
    return max(max_error(_weight(layer), start[name]) for name, layer in layers.items())


def _with_inputs(server: Server, ids: Tensor, layers: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of ``ids``, and what each of ``layers`` was given on the way."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given: inputs.update({name: given[0].detach()})

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        return server.logits(ids), inputs
    finally:
        for handle in handles:
            handle.remove()


def _lora_case(layer: Any, x: Tensor) -> LoraCase:
    """A copy of the layer with its active adapter, and ``x`` for an input."""
    (name,) = layer.active_adapters
    adapter = identity.Adapter(
        layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name]
    )
    return LoraCase(_weight(layer).clone(), (adapter,), x)


def _merged_layer(case: LoraCase, merged: Tensor, unmerged: Tensor) -> Iterator[IdentityCheck]:
    """A merged layer's output against the unmerged one's, and against what the algebra gives exactly."""
    bound = case.merged_bound()
    yield identity.check(merged, unmerged, bound, case.decomposed_bound())
    yield identity.check(merged, bound.value, bound)


def _restored(layer: Any, case: LoraCase) -> IdentityCheck:
    """The weight after merge and unmerge against where it began; the same rounded delta went on and came off."""
    (name,) = layer.active_adapters
    deltas = [Bounded.of(layer.get_delta_weight(name))]
    bound = identity.unmerge(identity.merge(Bounded.of(case.weight), deltas), deltas)
    return identity.check(_weight(layer), case.weight, bound)
