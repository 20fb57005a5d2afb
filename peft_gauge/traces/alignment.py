"""Alignment of two sequences of allocations in order.

It is a weighted longest common subsequence: among all alignments that keep both orders and pair only equal sizes of one
site, it has the greatest sum of `SAME_SIZE`, `SAME_SITE` and `SAME_LIFE` over its pairs. A site that only one side has,
such as a function that a release renamed, counts as unknown.

Equal beginnings and ends are removed first. The rest is a dynamic-programming table, computed one row at a time with
numpy, and divided as in Hirschberg (1975) if it would not fit in memory. Two sequences of 10,000 take about a second,
nearly equal ones much less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SAME_SIZE = 4
"""The weight of a pair in which one side has no site; the other weights choose between candidates of equal size."""
SAME_SITE = 2
"""Added if the same Python function requested both; allocations from different functions cannot be a pair."""
SAME_LIFE = 1
"""Added if both are freed within the phase that allocated them, or both outlive it."""

MOST_CELLS = 1 << 24


class Key(NamedTuple):
    """The key of an allocation: bytes in blocks of 512, its site or ``""``, and whether it outlives its phase."""

    nbytes: int
    site: str
    outlives: bool


def weight(left: Key, right: Key) -> int:
    """The weight of the pair; 0 if the two cannot be a pair."""
    known = bool(left.site and right.site)
    if left.nbytes != right.nbytes or (known and left.site != right.site):
        return 0
    return SAME_SIZE + SAME_SITE * known + SAME_LIFE * (left.outlives == right.outlives)


def align(left: Sequence[Key], right: Sequence[Key]) -> list[tuple[int, int]]:
    """The pairs of the alignment, as positions in ``left`` and ``right``, both ascending."""
    left, right = comparable(left, right)
    shorter = min(len(left), len(right))
    begin = 0
    while begin < shorter and left[begin] == right[begin]:
        begin += 1
    end = 0
    while end < shorter - begin and left[-1 - end] == right[-1 - end]:
        end += 1
    pairs = [(i, i) for i in range(begin)]
    middle = _Table(left, right).pairs(begin, len(left) - end, begin, len(right) - end)
    pairs += middle
    pairs += [(len(left) - i, len(right) - i) for i in range(end, 0, -1)]
    return pairs


def comparable(left: Sequence[Key], right: Sequence[Key]) -> tuple[list[Key], list[Key]]:
    """Both sequences, without sites that only one of them has."""
    common = {key.site for key in left} & {key.site for key in right}

    def within(side: Sequence[Key]) -> list[Key]:
        return [key if key.site in common else key._replace(site="") for key in side]

    return within(left), within(right)


class _Table:
    def __init__(self, left: Sequence[Key], right: Sequence[Key]) -> None:
        import numpy as np

        self._np = np
        self._left = left
        sites = {site: number for number, site in enumerate(dict.fromkeys(key.site for key in right))}
        self._numbers = sites
        self._nbytes = np.array([key.nbytes for key in right], dtype=np.int64)
        self._sites = np.array([sites[key.site] if key.site else -1 for key in right], dtype=np.int64)
        self._outlives = np.array([key.outlives for key in right], dtype=bool)
        self._weights: dict[Key, np.ndarray] = {}

    def pairs(self, top: int, bottom: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The alignment of ``left[top:bottom]`` with ``right[start:stop]``."""
        if top >= bottom or start >= stop:
            return []
        if (bottom - top + 1) * (stop - start + 1) <= MOST_CELLS or bottom - top == 1:
            return self._traced(top, bottom, start, stop)
        middle = (top + bottom) // 2
        upper = self._last_row(range(top, middle), start, stop, forwards=True)
        lower = self._last_row(range(bottom - 1, middle - 1, -1), start, stop, forwards=False)
        cut = start + int(self._np.argmax(upper + lower[::-1]))
        return self.pairs(top, middle, start, cut) + self.pairs(middle, bottom, cut, stop)

    def _row(self, position: int) -> np.ndarray:
        """The weights of ``left[position]`` with all of ``right``; equal keys share a row."""
        key = self._left[position]
        row = self._weights.get(key)
        if row is None:
            np = self._np
            same = self._sites == self._numbers.get(key.site, -2)
            known = (self._sites >= 0) & bool(key.site)
            row = SAME_SIZE + SAME_SITE * (same & known) + SAME_LIFE * (self._outlives == key.outlives)
            may_be = (self._nbytes == key.nbytes) & (same | ~known)
            row = self._weights[key] = np.where(may_be, row, 0).astype(np.int32)
        return row

    def _next(self, above: np.ndarray, weights: np.ndarray) -> np.ndarray:
        np = self._np
        row = above.copy()
        np.maximum(row[1:], above[:-1] + weights, out=row[1:])
        np.maximum.accumulate(row, out=row)
        return row

    def _last_row(self, positions: range, start: int, stop: int, *, forwards: bool) -> np.ndarray:
        row = self._np.zeros(stop - start + 1, dtype=self._np.int32)
        for position in positions:
            weights = self._row(position)[start:stop]
            row = self._next(row, weights if forwards else weights[::-1])
        return row

    def _traced(self, top: int, bottom: int, start: int, stop: int) -> list[tuple[int, int]]:
        np = self._np
        table = np.zeros((bottom - top + 1, stop - start + 1), dtype=np.int32)
        for number, position in enumerate(range(top, bottom), start=1):
            table[number] = self._next(table[number - 1], self._row(position)[start:stop])
        found = []
        i, j = bottom - top, stop - start
        while i and j:
            if table[i, j] == table[i - 1, j]:
                i -= 1
            elif table[i, j] == table[i, j - 1]:
                j -= 1
            else:
                i, j = i - 1, j - 1
                found.append((top + i, start + j))
        return found[::-1]
