"""Plans in the terminal: a table, and a stacked bar of the peak by category for each case."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from peft_gauge.report.format import ABSENT, shown, shown_bytes, step_parts
from peft_gauge.report.terminal.summary import as_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from peft_gauge.history.schema import CaseRecord

# Each category as (heading, glyph, colour): the glyphs distinguish them without colour.
LOOKS = {
    "base_weights": ("base weights", "█", "blue"),
    "quantization_constants": ("quantization constants", "▙", "bright_blue"),
    "adapter_weights": ("adapter weights", "▓", "cyan"),
    "buffers": ("buffers", "▖", "white"),
    "gradients": ("gradients", "▒", "yellow"),
    "optimizer_state": ("optimizer state", "▚", "magenta"),
    "optimizer_temporaries": ("optimizer temporaries", "▘", "bright_magenta"),
    "activations": ("activations", "░", "green"),
    "logits_and_loss": ("logits and loss", "╬", "red"),
    "dequantized_temporaries": ("dequantized temporaries", "▝", "bright_green"),
    "gathered_weights": ("gathered weights", "▤", "bright_cyan"),
    "unreduced_gradients": ("unreduced gradients", "▥", "bright_yellow"),
    "communication_buffers": ("communication buffers", "▦", "bright_red"),
    "inputs": ("inputs", "▗", "bright_black"),
    "other": ("other", "·", "bright_black"),
}
BAR_WIDTH = 60
LEAST_WIDTH = 100  # columns in a file, or the table's width: wrapped lines read better than truncated numbers
LEAST_WORTH = ("activations\nper token", "peak in", "resident", "trainable", "device")
"""Columns that a narrow terminal leaves out, in this order."""


def show(plans: Sequence[Mapping[str, Any]], *, wide: bool = False) -> None:
    """Print ``plans`` on standard output.

    A terminal that is too narrow for the table leaves out columns, unless ``wide``; a file or a pipe has all.
    """
    console = Console(highlight=False)
    least = 0 if console.is_terminal else LEAST_WIDTH
    left_out: tuple[str, ...] = ()
    shown_as = render(plans)
    while console.is_terminal and not wide and len(left_out) < len(LEAST_WORTH):
        if _width(console, shown_as) <= console.width:
            break
        left_out = LEAST_WORTH[: len(left_out) + 1]
        shown_as = render(plans, left_out=left_out)
    console.width = max(console.width, least, _width(console, shown_as))
    console.print(*shown_as, sep="\n")


def _width(console: Console, parts: Iterable[RenderableType]) -> int:
    """The columns of the widest table, or 0."""
    without_limit = console.options.update(width=10_000)
    tables = (part for part in parts if isinstance(part, Table))
    return max((Measurement.get(console, without_limit, table).maximum for table in tables), default=0)


def summary(cases: Iterable[CaseRecord], width: int) -> str:
    """A table for each model and shape planned by a run's cases, as text."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        if "plan" in case.metrics:
            groups.setdefault(title([case.metrics["plan"]]), []).append(case.metrics["plan"])
    return as_text(map(_table, groups.values()), width)


def render(
    plans: Sequence[Mapping[str, Any]], width: int = BAR_WIDTH, left_out: Sequence[str] = ()
) -> list[RenderableType]:
    """The renderables for ``plans`` (objects as printed by `--json`): table without the columns ``left_out``, adapted
    modules, bars with legend, warnings."""
    if not plans:
        return []
    return [_table(plans, left_out), *_adapted(plans), *_communication(plans), *_bars(plans, width), *_warnings(plans)]


def _communication(plans: Sequence[Mapping[str, Any]]) -> list[Text]:
    """The bytes that each rank of a sharded step sends, by method."""
    lines = []
    for plan in plans:
        parts = [
            f"{name.replace('_', '-')} {shown_bytes(each['sent_bytes'])} in {each['calls']} calls"
            for name, each in plan.get("communication", {}).items()
        ]
        if parts:
            lines.append(Text(f"sent by each GPU a step ({plan['method']}): {', '.join(parts)}"))
        if plan.get("host_bytes") is not None:
            lines.append(Text(f"in host memory for each GPU ({plan['method']}): {shown_bytes(plan['host_bytes'])}"))
    return lines


def _adapted(plans: Sequence[Mapping[str, Any]]) -> list[Text]:
    """The modules that each method adapts; equal lists appear once, with all their methods."""
    concerned: dict[str, list[str]] = {}
    for plan in plans:
        sentence = "; ".join(adapted_modules(plan.get("adapted_modules", ())))
        if sentence and plan["method"] not in concerned.setdefault(sentence, []):
            concerned[sentence].append(plan["method"])
    return [Text(f"adapted ({', '.join(names)}): {sentence}") for sentence, names in concerned.items()]


def adapted_modules(places: Sequence[Mapping[str, Any]]) -> list[str]:
    """``places`` (`peft_gauge.training.targets.Adapted` in JSON) as short sentences, one for all modules of the same
    layers: ``self_attn.(q_proj, k_proj) in 32 of 32 layers``."""
    groups: dict[tuple[int, int], dict[str, list[str]]] = {}
    for place in places:
        parent, _, name = str(place["module"]).rpartition(".")
        groups.setdefault((place["layers"], place["of_layers"]), {}).setdefault(parent, []).append(name)
    sentences = []
    for (layers, of_layers), parents in groups.items():
        parts = [_joined(parent, names) for parent, names in parents.items()]
        where = f" in {layers} of {of_layers} layers" if layers else ""
        sentences.append(f"{', '.join(parts)}{where}")
    return sentences


def _joined(parent: str, names: Sequence[str]) -> str:
    if not parent:
        return ", ".join(names)
    return f"{parent}.{names[0]}" if len(names) == 1 else f"{parent}.({', '.join(names)})"


def _table(plans: Sequence[Mapping[str, Any]], left_out: Sequence[str] = ()) -> Table:
    table = Table(title=title(plans), title_justify="left", caption_justify="left")
    table.caption = "peak, resident: by memory_allocated; device: estimate with CUDA context and workspaces"
    if any(plan["settings"].get("sharding") for plan in plans):
        table.caption += "; each for one of the GPUs"
    if plans[0]["gpus"]:
        table.caption += "; on a GPU: ✓ fits or ✗ does not, memory used, + left or − missing"
        if any(fit["retries"] for plan in plans for fit in plan["gpus"] if fit["fits"]):
            table.caption += "; *: fits after the allocator frees cached segments, which costs time"
    if left_out:
        names = ", ".join(name.replace("\n", " ") for name in left_out)
        table.caption += f"; left out for this width: {names} (--wide shows them)"
    headings, lines = columns(plans)
    kept = [place for place, heading in enumerate(headings) if heading not in left_out]
    for place in kept:
        table.add_column(headings[place], justify="right" if place > 1 else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(line[place] for place in kept))
    return table


def columns(plans: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The headings of the table of ``plans``, and a line of formatted cells for each."""
    searched = "find" in plans[0]
    sizes = ["trainable", "peak", "resident", "activations\nper token", "device"]
    largest = "fewest" if searched and plans[0]["find"]["quantity"] == "gpus" else "largest"
    cards = [f"on {fit['gpu']}\n({shown_bytes(fit['usable_bytes'])})" for fit in plans[0]["gpus"]]
    headings = ["method", "peak in", *([largest] if searched else []), *sizes, *cards]
    lines = []
    for plan in plans:
        found = [_found(plan["find"])] if searched else []
        lines.append([plan["method"], plan["phase_of_peak"], *found, *_cells(plan)])
    return headings, lines


def title(plans: Sequence[Mapping[str, Any]]) -> str:
    settings = plans[0]["settings"]
    parts = step_parts(settings, tokens="find" not in plans[0])
    if settings.get("attention") not in (None, "none"):
        parts.append(f"{settings['attention']} attention")
    title = f"{plans[0]['model']} planned, {', '.join(parts)}"
    bases = {plan.get("base") for plan in plans}
    if len(bases) == 1 and not bases & {None, "", settings["dtype"]}:
        title += f"\nbase: {bases.pop()}"  # on its own line, which no narrow table breaks
    return title


def _cells(plan: Mapping[str, Any]) -> list[str]:
    sizes = ("peak_bytes", "resident_bytes", "saved_activation_bytes_per_token")
    return [
        shown(plan["trainable_params"], "{:,}"),
        *(shown_bytes(plan[name]) for name in sizes),
        shown_bytes(plan["device_bytes_estimate"]),
        *(_fit(fit) for fit in plan["gpus"]),
    ]


def _fit(fit: Mapping[str, Any]) -> str:
    """Whether the step fits, memory used on the GPU, and memory left (+) or missing (−), in the unit of its heading.

    The second is the difference of the rounded sizes, so that the shown numbers add up.
    """
    unit = next(size for size in (1e9, 1e6, 1e3) if fit["usable_bytes"] >= size)
    device, usable = (round(fit[name] / unit, 2) for name in ("device_bytes", "usable_bytes"))
    mark, sign = ("✓", "+") if fit["fits"] else ("✗", "−")
    return f"{mark} {device:.2f} {sign}{abs(usable - device):.2f}{'*' if fit['retries'] else ''}"


def _found(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return ABSENT
    limit = " (the model's limit)" if found["at_limit"] else ""
    return f"{found['quantity']} {found['value']}{limit}"


def _bars(plans: Sequence[Mapping[str, Any]], width: int) -> list[Text]:
    largest = max(plan["peak_bytes"] for plan in plans)
    label = max(len(plan["method"]) for plan in plans)
    lines = [Text("peak by category")]
    for plan in plans:
        line = Text(f"{plan['method']:<{label}} ")
        line.append_text(bar(plan["peak_by_category"], largest, width))
        lines.append(line.append(f" {shown_bytes(plan['peak_bytes'])}"))
    return [*lines, _legend(plans)]


def bar(by_category: Mapping[str, int], full_bytes: int, width: int) -> Text:
    """A bar in which ``full_bytes`` take ``width`` cells.

    The ends of parts are rounded, not their lengths, so that the total length is right.
    """
    line, total, drawn = Text(), 0, 0
    for category, (_, glyph, colour) in LOOKS.items():
        total += by_category.get(category, 0)
        end = round(width * total / full_bytes)
        line.append(glyph * (end - drawn), style=colour)
        drawn = end
    return line


def _legend(plans: Sequence[Mapping[str, Any]]) -> Text:
    line = Text()
    for category, (heading, glyph, colour) in LOOKS.items():
        if any(plan["peak_by_category"].get(category) for plan in plans):
            line.append(glyph, style=colour).append(f" {heading}  ")
    return line


def _warnings(plans: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Each warning once, with its methods."""
    concerned: dict[str, list[str]] = {}
    for plan in plans:
        for warning in plan["warnings"]:
            concerned.setdefault(warning, []).append(plan["method"])
    return [Text(f"note ({', '.join(names)}): {warning}") for warning, names in concerned.items()]


def show_recipe(recipe: Mapping[str, Any], *, width: int | None = None) -> None:
    """Print how a recipe's file was read: each of its keys, and the defaults of the tool."""
    console = Console(width=width, highlight=False)
    lines = {
        f"understood of the {recipe['tool']} recipe": _pairs(recipe["understood"]),
        f"defaults of {recipe['tool']}": _pairs(recipe["defaults"]),
        "without an effect on memory": ", ".join(recipe["without_effect"]),
        "not modelled": "; ".join(f"{name}: {reason}" for name, reason in recipe["not_modelled"].items()),
    }
    for title, content in lines.items():
        if content:
            console.print(Text(f"{title}: {content}"))


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
