"""One colour and one shape per method, the same in every table and drawing, for light and for dark backgrounds.

The colours were searched for the greatest smallest distance (in Oklab) between any two, as seen with normal vision,
protanopia, deuteranopia and tritanopia, at a contrast of at least 3:1 with the background. Shapes distinguish methods
without any colour.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

COLOURS = (
    ("#1A1A1A", "#F5F5F5"),
    ("#0853ED", "#31B6FC"),
    ("#9F0800", "#D55C08"),
    ("#125766", "#6CA091"),
    ("#D0679B", "#A748A8"),
    ("#9C9800", "#EAD74B"),
    ("#2E99F5", "#ADCFB8"),
    ("#20038D", "#9A51FF"),
)
"""Pairs of a colour on white and the same method's colour on `DARK`."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
PATHS = {
    "circle": "M-5,0A5,5 0 1,1 5,0A5,5 0 1,1 -5,0Z",
    "square": "M-4.5,-4.5H4.5V4.5H-4.5Z",
    "triangle-up": "M0,-5L5,4H-5Z",
    "diamond": "M0,-6L5,0L0,6L-5,0Z",
    "cross": "M-2,-5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z",
    "triangle-down": "M0,5L5,-4H-5Z",
    "triangle-right": "M5,0L-4,5V-5Z",
}
"""The shapes as SVG paths around (0, 0), 12 pixels wide, as Vega draws them."""
METHODS = ("full", "lora", "qlora", "bottleneck", "prefix", "prompt", "ia3")
LIGHT, DARK = "#FFFFFF", "#141414"
GREY = ("#6B6B6B", "#9A9A9A")
BLACK = ("#1B1B1B", "#ECECEC")
WORSE, BETTER = ("#B34700", "#FF9D66"), ("#00568A", "#7CC7F2")

CATEGORIES_IN_THE_DARK = {
    "#332288": "#7064CC",
    "#117733": "#268244",
    "#882255": "#B34F82",
    "#661100": "#A8462F",
    "#666666": "#737373",
}
"""Colours of memory's categories that are too dark for a dark background, and their replacements."""


@dataclass(frozen=True)
class Look:
    """A mark's colour on a light and on a dark background, and its shape. ``place``: the colour's index."""

    place: int
    shape: str

    @property
    def light(self) -> str:
        return COLOURS[self.place][0]

    @property
    def dark(self) -> str:
        return COLOURS[self.place][1]


def looks_of(labels: Iterable[str]) -> dict[str, Look]:
    """The look of each label: the seven methods have their own, a variant of a method (such as "qlora-unprepared") has
    its colour and another shape, and any other label the next free pair. 49 other labels differ from each other.
    """
    found = {name: Look(place, SHAPES[place]) for place, name in enumerate(METHODS)}
    labels = list(dict.fromkeys(labels))
    taken = set(found.values())
    for label in sorted(set(labels) - found.keys()):
        method = re.split(r"[-, ]", label.lower())[0]
        own = found[label] = next((look for look in _candidates(method) if look not in taken), Look(7, "circle"))
        taken.add(own)
    return {label: found[label] for label in labels}


def _candidates(method: str) -> Iterator[Look]:
    """Looks for a label that begins with ``method``, the best first: a method's colour, or first a colour of none."""
    if method in METHODS:
        own = METHODS.index(method)
        yield from (Look(own, SHAPES[(own + step) % len(SHAPES)]) for step in range(1, len(SHAPES)))
    for turn in range(len(SHAPES)):
        for step in range(len(COLOURS)):
            yield Look((7 + step) % len(COLOURS), SHAPES[(step + turn) % len(SHAPES)])


def in_the_dark(spec: dict[str, Any]) -> dict[str, Any]:
    """``spec`` with the colours for a dark background."""
    text = json.dumps(spec)
    for light, dark in dark_colours().items():
        text = text.replace(f'"{light}"', f'"{dark}"')
    document: dict[str, Any] = json.loads(text)
    return document


def dark_colours() -> dict[str, str]:
    """The colour on a dark background of each colour on a light one."""
    return dict([*COLOURS, GREY, BLACK, WORSE, BETTER]) | CATEGORIES_IN_THE_DARK
