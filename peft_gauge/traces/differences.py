"""Differences between two steps, and rows that group them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peft_gauge.fingerprint.module_attribution import folded
from peft_gauge.memory.categories import OUTSIDE

# Kinds of differences.
SIZE = "another size"
ONLY_PLANNED = "only in the plan"
ONLY_MEASURED = "only in the measurement"
ALIVE_IN_PLAN = "alive in the plan only"
ALIVE_IN_MEASUREMENT = "alive in the measurement only"
THERE_BEFORE_PLANNED = "there before, only in the plan"
THERE_BEFORE_MEASURED = "there before, only in the measurement"
OTHER_MOMENT = "the peaks are at different moments"

# Categories for memory that is not in the plan.
NOT_PLANNED = "not in the plan"
WORKSPACES = "library workspaces"
UNSPLIT = "unsplit blocks and the like"
MOMENT = "moment"

LARGE_BYTES = 1 << 20
"""Differences of at least this size are reported separately from small ones."""


@dataclass(frozen=True)
class Difference:
    """One difference between the two steps.

    Attributes:
        number: that of the measured allocation in its step, from 1; if there is none, of the planned one.
        operator: the plan's. For an allocation that is not in the plan, the Python function that requested it or, in
            backward, whose thread has no Python frames, the planned operator just before.
        module: the plan's. For an allocation that is not in the plan, that of the planned allocation just before.
        planned_bytes, measured_bytes: 0 on a side that does not have the allocation.
    """

    kind: str
    phase: str
    number: int
    category: str
    operator: str
    module: str
    planned_bytes: int
    measured_bytes: int
    site: str = ""

    @property
    def bytes(self) -> int:
        """Bytes that the plan lacks (+) or has in excess (−)."""
        return self.measured_bytes - self.planned_bytes


@dataclass(frozen=True)
class Row:
    """Differences of one kind, operator and module, with layer numbers folded.

    Attributes:
        modules: the modules that were folded.
        first_number: the number of the first difference, as in `Difference`.
        site: the Python function that requested the first one.
    """

    kind: str
    phase: str
    category: str
    operator: str
    module: str
    count: int
    planned_bytes: int
    measured_bytes: int
    first_number: int
    modules: tuple[str, ...] = ()
    site: str = ""

    @property
    def bytes(self) -> int:
        """Bytes that the plan lacks (+) or has in excess (−)."""
        return self.measured_bytes - self.planned_bytes

    @property
    def where(self) -> str:
        """The module, with its layer number if there is only one."""
        return self.modules[0] if len(self.modules) == 1 else self.module


def there_before(
    category: str, operator: str, module: str, *, planned_bytes: int = 0, measured_bytes: int = 0
) -> Difference:
    kind = THERE_BEFORE_PLANNED if planned_bytes else THERE_BEFORE_MEASURED
    return Difference(kind, OUTSIDE, 0, category, operator, module, planned_bytes, measured_bytes)


def is_large(difference: Difference) -> bool:
    return abs(difference.bytes) >= LARGE_BYTES


def grouped(differences: Iterable[Difference]) -> list[Row]:
    """Rows that group differences of one kind, operator and module; largest sum first."""
    groups: dict[tuple[str, str, str, str, str], list[Difference]] = {}
    for each in differences:
        module = folded_module(each.module)
        groups.setdefault((each.kind, each.phase, each.category, each.operator, module), []).append(each)
    rows = [
        Row(
            *key,
            len(group),
            sum(each.planned_bytes for each in group),
            sum(each.measured_bytes for each in group),
            min(each.number for each in group),
            tuple(dict.fromkeys(each.module for each in group if each.module)),
            group[0].site,
        )
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -abs(row.bytes))


def folded_module(module: str) -> str:
    return folded(module) if module else ""
