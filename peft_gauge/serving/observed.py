"""Checks on a server: are outputs reproducible, and do loading or merging an adapter leave anything behind?

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
"""Number of layers checked against `identity`'s bounds; float64 arithmetic for all layers would take minutes."""

TOLERANCE = 10
"""Allowed error of a mixed batch, in multiples of the measured rounding error."""


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most ``most`` of ``names``, evenly spaced, with the first and the last."""
    if len(names) <= most:
        return list(names)
    return [names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)]


@dataclass(frozen=True)
class Visits:
    """Outputs of all visited adapters and the base (`BASE`), and those reproduced in a second round.

    ``outputs``: logits by adapter; ``returned``: adapters with bit-identical logits in the second round.
    """

    outputs: dict[str, Tensor]
    returned: tuple[str, ...]

    @property
    def least_difference(self) -> float:
        """The smallest difference between two adapters: of each pair, the largest absolute difference of logits."""
        return min(max_error(a, b) for a, b in itertools.combinations(self.outputs.values(), 2))


def visit(server: Server, ids: Tensor, names: Sequence[str]) -> Visits:
    """Switch through the base and ``names`` twice, so that each is left and visited again."""

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
    """A mixed batch compared with each adapter on its own.

    ``max_error``: the largest difference; ``rounding_error``: the largest difference between the same rows and adapter
    in one batch and one row at a time, where only the order of sums changes, but at least one rounding unit of the
    largest logit; ``least_difference``: between any two adapters (`Visits`).
    """

    max_error: float
    rounding_error: float
    least_difference: float

    @property
    def holds(self) -> bool:
        """Whether the error is within `TOLERANCE` of rounding, and this is less than between two adapters."""
        tolerance = TOLERANCE * self.rounding_error
        return self.max_error <= tolerance < self.least_difference


def mix(server: Server, ids: Tensor, names: Sequence[str], alone: Visits) -> Mixing:
    """Compare one batch of ``ids``, with one adapter of ``names`` per row, with the same rows in ``alone``."""
    mixed = server.mixed_logits(ids, names)
    expected = torch.stack([alone.outputs[name][row] for row, name in enumerate(names)])
    rounding = torch.finfo(expected.dtype).eps * float(expected.abs().max())
    for row, name in enumerate(names):
        if name != BASE:
            server.switch(name)
            rounding = max(rounding, max_error(server.logits(ids[row : row + 1])[0], expected[row]))
    return Mixing(max_error(mixed, expected), rounding, alone.least_difference)


def time_switches(server: Server, ids: Tensor, rule: StoppingRule, warm_up: WarmUp) -> Rounds:
    """Time switches from each adapter to the next; a forward of ``ids`` before each is the control."""
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
    """An adapter that was saved, loaded under another name, and deleted.

    ``disk_bytes``: size of its safetensors; ``load_seconds``: wall time to read and add it; ``same``: whether its
    output equals the original's bit by bit; ``kept_bytes``: memory still in use afterwards.
    """

    disk_bytes: int
    load_seconds: float
    same: bool
    kept_bytes: int


def turn_over(server: Server, ids: Tensor, name: str) -> Turnover:
    """Save the adapter called ``name``, load the copy next to it, and delete the copy."""
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
    unmerge, the largest deviation of a base weight from its start; ``weight_size``: the largest base weight;
    ``outputs`` and ``restored``: outputs of some layers, and their weights after the first cycle, checked against
    bounds on the rounding error; empty for a quantized base, which merging quantizes again.
    """

    max_error: float
    drifts: tuple[float, ...]
    weight_size: float
    outputs: tuple[IdentityCheck, ...]
    restored: tuple[IdentityCheck, ...]


def merge_cycles(server: Server, ids: Tensor, cycles: int) -> Merging:
    """Merge and unmerge the active adapter ``cycles`` times; the base keeps the resulting drift."""
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
    """A LoRA layer's base weight, dequantized if it is packed."""
    weight: Tensor = layer.get_base_layer().weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    dequantized: Tensor = dequantize_4bit(weight.data, state)
    return dequantized


def _drift(layers: dict[str, Any], start: dict[str, Tensor]) -> float:
    return max(max_error(_weight(layer), start[name]) for name, layer in layers.items())


def _with_inputs(server: Server, ids: Tensor, layers: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of ``ids``, and the input of each of ``layers``."""
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
    """A copy of the layer with its active adapter, and ``x`` as input."""
    (name,) = layer.active_adapters
    adapter = identity.Adapter(
        layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name]
    )
    return LoraCase(_weight(layer).clone(), (adapter,), x)


def _merged_layer(case: LoraCase, merged: Tensor, unmerged: Tensor) -> Iterator[IdentityCheck]:
    """Check a merged layer's output against the unmerged layer's, and against the exact algebraic value."""
    bound = case.merged_bound()
    yield identity.check(merged, unmerged, bound, case.decomposed_bound())
    yield identity.check(merged, bound.value, bound)


def _restored(layer: Any, case: LoraCase) -> IdentityCheck:
    """Check the weight after merge and unmerge against the start; the same rounded delta was added and subtracted."""
    (name,) = layer.active_adapters
    deltas = [Bounded.of(layer.get_delta_weight(name))]
    bound = identity.unmerge(identity.merge(Bounded.of(case.weight), deltas), deltas)
    return identity.check(_weight(layer), case.weight, bound)
