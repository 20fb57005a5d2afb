"""The table of changes that need less memory (`peft-gauge plan --advise`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peft_gauge.report.format import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_ROWS = 12


def show_advice(plan: Mapping[str, Any], *, width: int | None = None) -> None:
    """Print the advice for ``plan``, a plan's JSON with an entry ``advice``."""
    console = Console(width=width, highlight=False)
    advice = plan["advice"]
    if not advice:
        console.print(Text(f"{plan['method']}: none of the changes that were tried needs less memory"))
        return
    first = next((place for place, each in enumerate(advice) if each["fits"] and all(each["fits"].values())), None)
    table = Table(title=_title(plan), title_justify="left", caption=_caption(plan, first), caption_justify="left")
    table.add_column("change")
    for name in ("device", "saves", "FLOPs per token"):
        table.add_column(name, justify="right")
    calibrated = next(iter(advice[0]["tokens_per_second"]), None)
    if calibrated is not None:
        table.add_column("tokens/s, at most", justify="right")
    if plan["fits"]:
        table.add_column("fits")
    rows = list(enumerate(advice))
    kept = [row for row in rows if row[0] < MOST_ROWS or row[0] == first]
    for place, each in kept:
        cells = [
            " + ".join(each["changes"]),
            shown_bytes(each["device_bytes"]),
            shown_bytes(each["saved_bytes"]),
            f"{each['flops_ratio']:.2f}×",
        ]
        if calibrated is not None:
            cells.append(f"{each['tokens_per_second'][calibrated]:,.0f}")
        if plan["fits"]:
            fits = all(each["fits"].values())
            cells.append(("yes ←" if place == first else "yes") if fits else "no")
        table.add_row(*cells)
    console.print(table)


def _title(plan: Mapping[str, Any]) -> str:
    return f"changes of {plan['method']} that need less than {shown_bytes(plan['device_bytes_estimate'])}"


def _caption(plan: Mapping[str, Any], first: int | None) -> str:
    left_out = max(len(plan["advice"]) - MOST_ROWS, 0)
    lines = ["same tokens on one GPU first, then by FLOPs, which leave out the time of dequantization and paging"]
    for gpu in plan["advice"][0]["tokens_per_second"]:
        lines.append(f"tokens/s: the speed of a matrix product calibrated on {gpu} over the FLOPs, an upper bound")
        break
    if left_out:
        lines.append(f"{left_out} more in --json")
    if plan["fits"]:
        if all(plan["fits"].values()):
            lines.append("the step fits as it is")
        elif first is None:
            lines.append("none of these fits; combine more of them, or take a smaller model or a larger GPU")
    return "; ".join(lines)
