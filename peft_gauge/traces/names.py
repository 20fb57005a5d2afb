"""Names for measured allocations that are not in the plan, from planned allocations in the same place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from peft_gauge.memory.overheads import (
    CUBLAS_WORKSPACE_BYTES,
    CUBLAS_WORKSPACE_HOPPER_BYTES,
    CUBLASLT_WORKSPACE_BYTES,
)
from peft_gauge.traces.differences import NOT_PLANNED, WORKSPACES, folded_module
from peft_gauge.traces.log import BEFORE, Allocation, StepLog

if TYPE_CHECKING:
    from peft_gauge.traces.pairing import Gap, Pairing

WORKSPACE_NAMES: Mapping[int, str] = {
    CUBLAS_WORKSPACE_HOPPER_BYTES: "cuBLAS workspace",
    CUBLAS_WORKSPACE_BYTES: "cuBLAS workspace",
    CUBLASLT_WORKSPACE_BYTES: "cuBLASLt workspace",
}
"""Sizes of the workspaces of cuBLAS and cuBLASLt. An unplanned allocation of such a size is a workspace if a matrix
product requested it, or if it is from before the step."""

_PRODUCTS = ("linear", "matmul", "bmm", "baddbmm", "addmm", "mm")


class PlannedNames:
    """The names of allocations in ``planned``, by the places of their partners in ``measured``."""

    def __init__(self, planned: StepLog, measured: StepLog, pairing: Pairing) -> None:
        self.planned, self.measured, self.equal = planned, measured, pairing.equal
        self._names = self._learned()

    def _learned(self) -> dict[tuple[Any, ...], Counter[tuple[str, str, str, bool]]]:
        """The plan's names for the allocations of a place and size, by `_contexts`: category, operator, folded module,
        and whether its layer numbers match the allocation after it rather than the one before."""
        names: dict[tuple[Any, ...], Counter[tuple[str, str, str, bool]]] = defaultdict(Counter)
        ours = [self.planned.allocations[mine] for mine, _ in self.equal]
        for number, (_, its) in enumerate(self.equal):
            left = ours[number]
            before = ours[number - 1] if number else None
            until = ours[number + 1] if number + 1 < len(ours) else None
            module = folded_module(left.module)
            of_before = before is not None and _with_indices(module, before.module) == left.module
            of_next = until is not None and _with_indices(module, until.module) == left.module
            for key in _contexts(self.measured.allocations[its], before):
                names[key][left.category, left.operator, module, of_next and not of_before] += 1
        return names

    def _planned(self, index: int | None) -> Allocation | None:
        return None if index is None else self.planned.allocations[index]

    def unplanned(self, found: Allocation, gap: Gap | None) -> tuple[str, str, str]:
        """Category, operator and module of a measured allocation that is not in the plan: the plan's for the same place
        and size in another layer, otherwise the requesting function and the module of the planned allocation before."""
        function = found.site.rpartition(":")[2]
        stays = found.born == BEFORE or (found.died is None and found.nbytes != CUBLASLT_WORKSPACE_BYTES)
        if found.nbytes in WORKSPACE_NAMES and (function in _PRODUCTS or stays):
            return WORKSPACES, WORKSPACE_NAMES[found.nbytes], ""
        before, until = (None, None) if gap is None else (self._planned(gap.after), self._planned(gap.until))
        for key in _contexts(found, before):
            if key in self._names:
                (category, operator, module, of_next), _ = self._names[key].most_common(1)[0]
                neighbour = (until or before) if of_next else (before or until)
                return category, operator, _with_indices(module, neighbour.module) if neighbour else module
        module = before.module if before is not None else ""
        if found.site:
            return NOT_PLANNED, found.site, module
        return NOT_PLANNED, f"after {before.operator}" if before is not None and before.operator else "", module


def _contexts(found: Allocation, before: Allocation | None) -> Iterator[tuple[Any, ...]]:
    """Keys for the place of a measured allocation: its stack, then the planned one before; each with its size."""
    if found.stack:
        yield "stack", found.stack, found.nbytes
    elif before is not None:
        yield "after", before.operator, folded_module(before.module), found.nbytes


def _with_indices(template: str, neighbour: str) -> str:
    """A folded path with the layer numbers of ``neighbour``, as far as the two paths agree."""
    parts = template.split(".")
    for number, (part, own) in enumerate(zip(parts, neighbour.split("."), strict=False)):
        if part != own and not (part == "*" and own.isdigit()):
            break
        parts[number] = own
    return ".".join(parts)
