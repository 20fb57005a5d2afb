"""PNG images as pixels, without a package: 8 bits a channel, with or without alpha, as a browser's screenshots are."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

Box = Sequence[float]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True)
class Image:
    """``rows`` of red, green and blue values, three bytes a pixel."""

    width: int
    height: int
    rows: tuple[bytes, ...]

    def grid(self, box: Box, columns: int, lines: int) -> list[list[float]]:
        """The mean colour of each cell of a grid over ``box``; images of other sizes can be compared by it."""
        left, top, right, bottom = box
        cells = []
        for line in range(lines):
            y0, y1 = self._span(top, bottom, line, lines, self.height)
            for column in range(columns):
                x0, x1 = self._span(left, right, column, columns, self.width)
                part = [self.rows[y][3 * x0 : 3 * x1] for y in range(y0, y1)]
                number = (x1 - x0) * (y1 - y0)
                cells.append([sum(sum(row[channel::3]) for row in part) / number for channel in range(3)])
        return cells

    @staticmethod
    def _span(low: float, high: float, place: int, number: int, most: int) -> tuple[int, int]:
        size = (high - low) / number
        first = min(max(int(low + place * size), 0), most - 1)
        return first, min(max(int(low + (place + 1) * size), first + 1), most)


def decode(data: bytes) -> Image:
    """The pixels of a PNG; alpha is dropped."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    place, packed = 8, b""
    width = height = step = 0
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        place += size + 12
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", content)
            assert (depth, interlaced) == (8, 0)
            step = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            packed += content
    raw, rows, above = zlib.decompress(packed), [], bytes(width * step)
    for y in range(height):
        start = y * (width * step + 1)
        above = _unfiltered(raw[start], raw[start + 1 : start + 1 + width * step], above, step)
        rows.append(above if step == 3 else bytes(value for at, value in enumerate(above) if at % 4 != 3))
    return Image(width, height, tuple(rows))


def _unfiltered(kind: int, line: bytes, above: bytes, step: int) -> bytes:
    """A scanline without its filter: 0 none, 1 left, 2 above, 3 their mean, 4 Paeth's nearest of three."""
    if kind == 0:
        return line
    if kind == 2:
        return bytes((a + b) & 255 for a, b in zip(line, above, strict=True))
    found = bytearray(line)
    for at, value in enumerate(line):
        left = found[at - step] if at >= step else 0
        corner = above[at - step] if at >= step else 0
        guess = {1: left, 3: (left + above[at]) // 2}.get(kind)
        found[at] = (value + (_paeth(left, above[at], corner) if guess is None else guess)) & 255
    return bytes(found)


def _paeth(left: int, above: int, corner: int) -> int:
    guess = left + above - corner
    return min((left, above, corner), key=lambda one: abs(guess - one))
