"""One base model that serves many adapters through PEFT's own interface: what one more costs, and what it changes.

All adapters lie beside the base's weights. `Server.switch` makes one of them the active one; a mixed batch names one
for each row. Only LoRA's tuners read such names: the others pass over them without a word (PEFT 0.18 to 0.21), so no
other method is served here.

Shapes: token ids (rows, seq), logits (rows, seq, vocabulary).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge import counting, identity, isolation, methods, models
from peft_gauge.clock import timed
from peft_gauge.clock.rounds import Rounds, StoppingRule, Stopwatch, WarmUp
from peft_gauge.clock.rounds import measure as measure_rounds
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.identity import Bounded, IdentityCheck, LoraCase

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_gauge.cases import Case
    from peft_gauge.methods import Method

FIRST = "default"
"""The name that PEFT gives the adapter a model is made with."""

BASE = "__base__"
"""PEFT's name, in a mixed batch, for a row that no adapter changes."""

DRAWN_SIZE = 0.02
"""Standard deviation of a drawn adapter's weights, about that of LoRA's A at its start; B is as large, not zero."""

CHECKED_LAYERS = 4
"""Layers that are held against `identity`'s bounds; the float64 arithmetic of all of them would take minutes."""

TOLERANCE = 10
"""How many times the measured rounding error a mixed batch may be off."""


def check_served(method: Method) -> None:
    """Raise `GaugeError` for a method whose adapters cannot share a base and a batch."""
    if method.peft_config.get("peft_type") != "LORA":
        raise GaugeError(f"{method.name} has no adapters that PEFT can mix in one batch; take a LoRA method")


class Server:
    """One base and its adapters, by name, ready for inference.

    The first adapter, `FIRST`, is ``method``'s, drawn from ``seed``. ``base`` is used up: quantised where the method
    says so, and brought to ``device``. Raises `GaugeError` for a method that `check_served` refuses.
    """

    def __init__(self, base: PreTrainedModel, method: Method, *, seed: int = 0, device: str = "cpu") -> None:
        check_served(method)
        self.method = method
        self.device = device
        base = methods.prepare_base(base, method, device=device)
        if method.quantization is not None:
            with torch.no_grad():  # on a CPU, bitsandbytes packs a weight anew when it is first used
                base.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
        self.base_bytes = stored_bytes(base)
        prepared = replace(method, quantization=None, prepare_kbit=False)
        self.model: Any = methods.attach(base, prepared, seed=seed).to(device).eval()
        self.adapter_dtype = next(each.dtype for each in self.model.parameters() if each.requires_grad)
        self.merged: str | None = None
        self._draw(FIRST, seed)

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they came."""
        return list(self.model.peft_config)

    @property
    def adapters_bytes(self) -> int:
        """What all adapters together add to the base, in bytes of tensors."""
        return stored_bytes(self.model) - self.base_bytes

    def add(self, name: str, seed: int) -> None:
        """A further adapter like the first one, its weights drawn from ``seed``."""
        self._check_new(name)
        config = copy.deepcopy(self.model.peft_config[FIRST])
        with _refusing(f"adapter {name!r} cannot be added"):
            self.model.add_adapter(name, config)
        self.model.eval()  # PEFT makes the new adapter's dropout in training mode, whatever mode the model is in
        self._draw(name, seed)

    def load(self, folder: Path, name: str) -> None:
        """A further adapter from a ``folder`` that `save` or PEFT wrote.

        Raises `GaugeError` where there is none, or one of another base model; nothing of it stays then.
        """
        self._check_new(name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / file).is_file():  # PEFT would go on to look for it on the hub
                raise GaugeError(f"no adapter in {folder}: {file} is missing")
        try:
            with _refusing(f"the adapter in {folder} does not fit this base model"):
                keys = self.model.load_adapter(
                    str(folder),
                    name,
                    torch_device=self.device,
                    autocast_adapter_dtype=self.method.autocast_adapter_dtype,
                )
                unfitting = [*keys.missing_keys, *keys.unexpected_keys]
                if unfitting:  # PEFT leaves them out in silence
                    raise ValueError(f"{len(unfitting)} tensors have no counterpart, first {unfitting[0]}")
        except GaugeError:
            if name in self.names:
                self.model.delete_adapter(name)
            raise

    def save(self, name: str, folder: Path) -> Path:
        """Write the adapter called ``name`` as PEFT does; returns the folder it lies in, at or below ``folder``."""
        self._check_known(name)
        self.model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        return folder if name == FIRST else folder / name

    def delete(self, name: str) -> None:
        """Let the adapter called ``name`` go; the active one has to be switched away from first."""
        self._check_known(name)
        if name in self.model.active_adapters:
            raise GaugeError(f"the adapter {name!r} is active; switch to another one before deleting it")
        self.model.delete_adapter(name)

    def switch(self, name: str) -> None:
        """Make the adapter called ``name`` the active one."""
        self._check_known(name)
        self._check_unmerged()
        self.model.set_adapter(name)

    def logits(self, ids: Tensor) -> Tensor:
        """What the active adapter makes of ``ids``."""
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False).logits

    def base_logits(self, ids: Tensor) -> Tensor:
        """What the base makes of ``ids``, its adapters switched off for this one call."""
        self._check_unmerged()
        with self.model.disable_adapter():
            return self.logits(ids)

    def mixed_logits(self, ids: Tensor, names: Sequence[str]) -> Tensor:
        """``ids`` in one batch, each row through the adapter that ``names`` gives it, or through the base (`BASE`)."""
        self._check_unmerged()
        for name in names:
            if name != BASE:
                self._check_known(name)
        if len(names) != len(ids):
            raise GaugeError(f"{len(ids)} rows need as many adapter names, not {len(names)}")
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False, adapter_names=list(names)).logits

    def merge(self) -> None:
        """Fold the active adapter into the base's weights."""
        self._check_unmerged()
        with warnings.catch_warnings():
            # That merging into 4 bit loses something is what is measured here.
            warnings.filterwarnings("ignore", "Merge lora module to 4-bit linear", UserWarning)
            warnings.filterwarnings("ignore", "Unmerge lora module to 4-bit linear", UserWarning)
            self.model.merge_adapter()
        self.merged = self.model.active_adapter

    def unmerge(self) -> None:
        """Take the merged adapter off the base's weights again."""
        if self.merged is None:
            raise GaugeError("no adapter is merged; nothing can be unmerged")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unmerge lora module to 4-bit linear", UserWarning)
            self.model.unmerge_adapter()
        self.merged = None

    def layers(self) -> dict[str, Any]:
        """PEFT's LoRA layers by module name."""
        from peft.tuners.lora import LoraLayer

        return {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}

    def _draw(self, name: str, seed: int) -> None:
        """Fill the adapter's tensors, in the first one's dtype: PEFT's versions differ in that of an added one."""
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in self.model.named_parameters():
            if name in path.split("."):
                drawn = torch.randn(parameter.shape, generator=generator) * DRAWN_SIZE
                parameter.data = drawn.to(parameter.device, self.adapter_dtype)

    def _check_known(self, name: str) -> None:
        if name not in self.model.peft_config:
            raise unknown("adapter", name, self.names)

    def _check_new(self, name: str) -> None:
        self._check_unmerged()
        if name in self.model.peft_config:
            raise GaugeError(f"there is an adapter {name!r} already; give this one another name")
        if name == BASE or not name or "." in name:
            raise GaugeError(f"{name!r} cannot name an adapter: empty, with a dot, or PEFT's own word for the base")

    def _check_unmerged(self) -> None:
        if self.merged is not None:
            raise GaugeError(f"the adapter {self.merged!r} is merged into the base; unmerge it first")


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PEFT, safetensors and torch each refuse in their own way
        raise GaugeError(f"{what}: {one_line(error, 240)}") from error


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, quantisation constants and buffers of ``model``."""
    counted = counting.count(model)
    return counted.weight_bytes + counted.buffer_bytes


def grow(server: Server, number: int, seed: int = 0) -> None:
    """Add adapters, each drawn from a seed of its own, until there are ``number``."""
    for index in range(len(server.names), number):
        server.add(f"task-{index}", seed + index)


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most ``most`` of ``names``, the first and the last among them, evenly between."""
    if len(names) <= most:
        return list(names)
    return [names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)]


# What is observed of a server.


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


# A case in a process of its own.


@dataclass(frozen=True)
class Setup:
    """What one process measures.

    Fields:
        case: model, method, device, dtype and seed; of its settings, the length of a row.
        counts: numbers of adapters, ascending.
        rule, warm_up: how often a switch is timed.
        cycles: of merge and unmerge, on the last adapter.
    """

    case: Case
    counts: tuple[int, ...]
    rule: StoppingRule
    warm_up: WarmUp
    cycles: int = 10


def measure(setup: Setup) -> dict[str, Any]:
    """The figures of ``setup``, as JSON holds them: ``served``, a record for each count; and with the most adapters
    ``turnover`` and ``merging``."""
    case = setup.case
    isolation.note(phase="load")
    base = models.build(case.model, dtype=case.dtype)
    server = Server(base, case.method, seed=case.seed, device=case.device)
    served = []
    for number in setup.counts:
        isolation.note(phase=f"{number} adapters")
        grow(server, number, case.seed)
        served.append({"adapters": number, **figures(server, setup)})
    isolation.note(phase="merging")
    ids = token_ids(server, 1, case.settings.seq, case.seed)
    turnover = turn_over(server, ids, server.names[-1])
    return {"served": served, "turnover": asdict(turnover), "merging": merging_figures(server, ids, setup.cycles)}


def token_ids(server: Server, rows: int, seq: int, seed: int) -> Tensor:
    """``rows`` rows of ``seq`` token ids, drawn from ``seed``."""
    vocabulary = server.model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (rows, seq), generator=torch.Generator().manual_seed(seed)).to(server.device)


def figures(server: Server, setup: Setup) -> dict[str, Any]:
    """What is true of ``server`` with the adapters it has, by name, flat."""
    looked_at = spread(server.names, 2)
    names = [*looked_at, BASE, looked_at[0]]  # an adapter's rows need not lie together
    ids = token_ids(server, len(names), setup.case.settings.seq, setup.case.seed)
    visits = visit(server, ids, looked_at)
    mixing = mix(server, ids, names, visits)
    rounds = time_switches(server, ids[:1], setup.rule, setup.warm_up)
    number = len(server.names)
    return {
        "adapter_bytes": server.adapters_bytes / number,
        "full_copy_bytes": server.base_bytes,
        "served_bytes": server.base_bytes + server.adapters_bytes,
        "full_copies_bytes": number * server.base_bytes,
        "visited": len(visits.outputs),
        "returned": len(visits.returned),
        "least_difference": visits.least_difference,
        "mixed_max_error": mixing.max_error,
        "rounding_error": mixing.rounding_error,
        "mixed_holds": mixing.holds,
        "switch_over_forward": rounds.over_control,
        "switch_seconds": list(rounds.seconds),
        "control_seconds": list(rounds.control_seconds),
    }


def merging_figures(server: Server, ids: Tensor, cycles: int) -> dict[str, Any]:
    """What merging and unmerging the active adapter does, by name, flat."""
    found = merge_cycles(server, ids, cycles)
    record: dict[str, Any] = {
        "merged_max_error": found.max_error,
        "drift_after_one_cycle": found.drifts[0],
        "drift_after_all_cycles": found.drifts[-1],
        "cycles": cycles,
        "largest_weight": found.weight_size,
    }
    if found.outputs:
        record["merged_share_of_bound"] = max(each.share_of_bound for each in found.outputs)
        record["restored_share_of_bound"] = max(each.share_of_bound for each in found.restored)
    return record
