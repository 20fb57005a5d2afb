"""Compare two fingerprints of a training step. They are plain records; nothing here needs torch.

`peft_gauge.fingerprint` makes the records. All but their losses are exact: any difference, however small, is a
difference in the operations of the step.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft_gauge.errors import GaugeError

LOSS_TOLERANCE: Mapping[str, float] = {"float64": 2e-6, "float32": 2e-6, "float16": 1e-3, "bfloat16": 1e-3}
"""Dtype of a step's matrix products -> relative difference of losses that another order of rounding can cause.

Measured on the first three losses of SmolLM2-135M. With attention fused or written out, they differ by up to 2e-7 in
float32 and up to 4e-4 in bfloat16; bfloat16 instead of float32 changes them by 5e-6 to 3e-4. So the tolerance detects
a float32 step that runs in bfloat16. float16 has bfloat16's tolerance.
"""

_PHASES = ("forward", "backward", "optimizer")
_UNKNOWN_MODULE = "?"
Value = int | float | None


@dataclass(frozen=True)
class Difference:
    """One difference between two fingerprints.

    ``what``: the part of the record (``"modules"``: an operator called as often as before, but in other modules);
    ``phase``, ``name`` (of an operator, dtype, category or direction) and ``module``, where they apply; ``before`` and
    ``after``, ``None`` where only a lower bound or no value is known; ``text``: one line for a reader.
    """

    what: str
    phase: str | None
    name: str | None
    module: str | None
    before: Value
    after: Value
    text: str


_COSTS = frozenset(
    ("operators", "flops", "product_flops", "bytes", "peak_bytes", "resident_bytes", "saved_activation_bytes")
)
"""Parts of a record for which less is better, as long as nothing else changed."""


def only_less(found: Sequence[Difference]) -> bool:
    """Whether the step does the same at lower cost: all differences are costs, and each of them fell.

    With operators in other modules, another number of trainable parameters or another loss, it is not the same step.
    Where a side has no value, as for FLOPs of operators without a formula, nothing is known to have fallen.
    """
    return bool(found) and all(
        each.what in _COSTS and each.before is not None and each.after is not None and each.after < each.before
        for each in found
    )


def digest(record: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that identify everything exact: all but the losses."""
    exact = {key: value for key, value in record.items() if key != "losses"}
    text = json.dumps(exact, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, loss_tolerance: float | None = None
) -> list[Difference]:
    """The differences from ``old`` to ``new``, in the records' own order; empty for two equal steps.

    ``loss_tolerance``: the relative difference up to which losses count as equal. The default is the `LOSS_TOLERANCE`
    of the coarsest dtype of a step's products, and the smaller one of the two steps. If a step has products without a
    FLOP formula, its FLOPs are lower bounds, and a difference in them has no value on that side.

    Raises `GaugeError` for records of different versions and for a value that is not such a record.
    """
    try:
        if old["version"] != new["version"]:
            raise GaugeError(
                f"fingerprints of versions {old['version']} and {new['version']} cannot be compared; record both anew"
            )
        before, after = dict(_leaves(old)), dict(_leaves(new))
        tolerance = min(_tolerance(old), _tolerance(new)) if loss_tolerance is None else loss_tolerance
        losses = list(_losses(old["losses"], new["losses"], tolerance))
        incomplete = (not old["flops_complete"], not new["flops_complete"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GaugeError(f"not a fingerprint of a step: {type(error).__name__} {error}") from error
    moved = _moved(before, after)
    changed = [key for key in before.keys() | after.keys() if _value(before, key) != _value(after, key)]
    exact = [
        _difference(key, _value(before, key), _value(after, key), incomplete)
        for key in sorted(changed, key=_Key.rank)
        if (key.phase, key.name) not in moved or key.what != "operators"
    ]
    return [*exact, *moved.values(), *losses]


# --- the exact part -----------------------------------------------------------------------------------------


class _Key(NamedTuple):
    """The position of a number in a record."""

    what: str
    phase: str | None = None
    name: str | None = None
    module: str | None = None

    def rank(self) -> tuple[int, int, str, str]:
        phase = _PHASES.index(self.phase) if self.phase in _PHASES else len(_PHASES)
        return list(_TEXTS).index(self.what), phase, self.name or "", self.module or ""


def _leaves(record: Mapping[str, Any]) -> Iterator[tuple[_Key, Value]]:
    for phase, by_name in record["operators"].items():
        for name, by_module in by_name.items():
            yield from ((_Key("operators", phase, name, module), calls) for module, calls in by_module.items())
    for what in ("flops", "product_flops", "bytes"):
        for phase, named in record[what].items():
            yield from ((_Key(what, phase, name), number) for name, number in named.items())
    for what in ("flops_unknown", "peak_bytes", "resident_bytes"):
        yield from ((_Key(what, None, name), number) for name, number in record[what].items())
    yield from ((_Key("trainable", None, dtype), number) for dtype, number in record["trainable"]["by_dtype"].items())
    yield _Key("trainable", None, "all"), record["trainable"]["total"]
    for what in ("saved_activation_bytes", "adapter_bytes"):
        yield _Key(what), record[what]


def _value(leaves: Mapping[_Key, Value], key: _Key) -> Value:
    """The count in a record: 0 for an operator, dtype or category that it does not name."""
    return leaves.get(key, 0)


_TEXTS = {
    "operators": "{phase}: {change} {name}{place} ({before} → {after})",
    "flops": "{phase}: FLOPs of {name}: {before} → {after}",
    "product_flops": "{phase}: FLOPs of products in {name}: {before} → {after}",
    "flops_unknown": "flops: unknown operator {name}, {before} → {after} calls: FLOPs with it are lower bounds",
    "bytes": "{phase}: bytes {name}: {before} → {after}",
    "peak_bytes": "peak bytes, {name}: {before} → {after}",
    "resident_bytes": "resident bytes, {name}: {before} → {after}",
    "saved_activation_bytes": "saved activations, bytes: {before} → {after}",
    "trainable": "trainable parameters, {name}: {before} → {after}",
    "adapter_bytes": "saved adapter, bytes: {before} → {after}",
}


def _difference(key: _Key, before: Value, after: Value, incomplete: tuple[bool, bool]) -> Difference:
    bounds = incomplete if key.what in ("flops", "product_flops") else (False, False)
    text = _TEXTS[key.what].format(
        phase=key.phase,
        name=key.name,
        place=_place(key.module),
        change=f"{(after or 0) - (before or 0):+}",
        before=_shown(before, bounds[0]),
        after=_shown(after, bounds[1]),
    )
    return Difference(*key, None if bounds[0] else before, None if bounds[1] else after, text)


def _shown(value: Value, is_bound: bool) -> str:
    if value is None:
        return "unknown"
    return f"at least {value:,}" if is_bound else f"{value:,}"


def _place(module: str | None) -> str:
    return "" if module in (None, _UNKNOWN_MODULE) else f" in {module}"


def _moved(
    before: Mapping[_Key, Value], after: Mapping[_Key, Value]
) -> dict[tuple[str | None, str | None], Difference]:
    """Operators called as often as before, but in other modules (for example renamed ones): one line each."""
    places: dict[tuple[str | None, str | None], tuple[dict[str, int], dict[str, int]]] = {}
    for side, leaves in enumerate((before, after)):
        for key, calls in leaves.items():
            if key.what == "operators":
                assert key.module is not None
                assert isinstance(calls, int)
                places.setdefault((key.phase, key.name), ({}, {}))[side][key.module] = calls
    found = {}
    for (phase, name), (old, new) in places.items():
        total = sum(old.values())
        if old != new and total == sum(new.values()):
            left = [module for module in old if old[module] > new.get(module, 0)]
            entered = [module for module in new if new[module] > old.get(module, 0)]
            text = f"{phase}: {name}, {total:,} calls as before, but from {_some(left)} to {_some(entered)}"
            found[phase, name] = Difference("modules", phase, name, None, total, total, text)
    return found


def _some(modules: list[str], limit: int = 3) -> str:
    rest = f" and {len(modules) - limit} more" if len(modules) > limit else ""
    return ", ".join(sorted(modules)[:limit]) + rest


# --- the losses ---------------------------------------------------------------------------------------------


def _tolerance(record: Mapping[str, Any]) -> float:
    dtypes = {dtype for by_dtype in record["product_flops"].values() for dtype in by_dtype}
    return max(
        (LOSS_TOLERANCE[dtype] for dtype in dtypes & LOSS_TOLERANCE.keys()), default=max(LOSS_TOLERANCE.values())
    )


def _losses(old: list[float], new: list[float], tolerance: float) -> Iterator[Difference]:
    for number, (before, after) in enumerate(zip(old, new, strict=True), start=1):
        if not math.isclose(before, after, rel_tol=tolerance):
            apart = abs(after - before) / max(abs(before), abs(after))
            text = f"loss of step {number}: {before!r} → {after!r}, {apart:.1e} apart (rounding: up to {tolerance:g})"
            yield Difference("losses", None, f"step {number}", None, before, after, text)
