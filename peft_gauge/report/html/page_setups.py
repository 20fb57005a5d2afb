"""The top of the page: for each setup, which method to use, five answers at a glance, and a grid of its methods."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from peft_gauge.report.format import ABSENT
from peft_gauge.report.html import page_data
from peft_gauge.report.html.page_cells import filterable, fits, number, plain, seconds, size, swatch, table, text
from peft_gauge.report.html.page_history import subject_of
from peft_gauge.report.html.recommendation import fastest_of, recommend
from peft_gauge.report.html.setups import GPU_SIZES

if TYPE_CHECKING:
    from peft_gauge.report.charts.looks import Look
    from peft_gauge.report.html.page_cells import Line
    from peft_gauge.report.html.page_data import Machine
    from peft_gauge.report.html.setups import MethodResult, Setup

USUAL_SIZE = "24GB"
VERDICTS = ("worse", "better", "inconclusive", "same")
Told = tuple[str, str]
"""A card's headline and the line below it, as HTML."""


def blocks(setups: Sequence[Setup], machines: Mapping[str, Machine], looks: Mapping[str, Look]) -> str:
    """A block for each setup. The page shows one; the others are hidden until they are chosen."""
    if not setups:
        return "<p>No run counted, timed or planned a method.</p>"
    options = "".join(f'<option value="{html.escape(each.where)}">{text(each.where)}</option>' for each in setups)
    chooser = f'<form class="pick" aria-label="Which step"><label>model, step and machine<select name="setup">{options}'
    verdicts = {name: verdicts_of(machine) for name, machine in machines.items()}
    parts = [
        _block(place, each, machines[each.machine], verdicts[each.machine], looks) for place, each in enumerate(setups)
    ]
    return f'{chooser}</select></label></form>\n{"".join(parts)}<p id="no-setup" hidden>No step passes the filters.</p>'


def _block(
    place: int,
    setup: Setup,
    machine: Machine,
    verdicts: dict[str | None, Counter[str]] | None,
    looks: Mapping[str, Look],
) -> str:
    subject = {"machine": setup.machine, "model": setup.model}
    methods = html.escape(" ".join(dict.fromkeys(each.method for each in setup.methods)))
    own = f' data-where="{html.escape(setup.where)}"{filterable(subject)} data-methods="{methods}"'
    return (
        f'<article class="setup"{own}{" hidden" if place else ""}>'
        f"{_recommendation(setup, looks)}{_cards(setup, machine, verdicts)}{_grid(place, setup, looks)}</article>\n"
    )


def _recommendation(setup: Setup, looks: Mapping[str, Look]) -> str:
    found = recommend(setup)
    mark = swatch(looks[found.method]) if found.method is not None else ""
    reasons = "".join(f"<li>{text(line)}</li>" for line in found.reasons)
    doubts = "".join(f"<li>{text(line)}</li>" for line in found.doubts)
    why = f'<p class="why">Why</p><ul>{reasons}</ul>' if reasons else ""
    return (
        f'<div class="recommendation{"" if found.method else " open"}"><h3>{mark}{text(found.headline)}</h3>'
        f'<div class="columns"><div>{why}</div><div><p class="why">How sure</p><ul>{doubts}</ul></div></div></div>'
    )


# Cards: an answer for all methods, and one for each method, shown where a filter picks it


def _cards(setup: Setup, machine: Machine, verdicts: dict[str | None, Counter[str]] | None) -> str:
    cards: list[tuple[str, Told, Callable[[MethodResult], Told] | None]] = [
        ("Fits?", _fits(setup), _fits_one),
        ("Fastest?", _fastest(setup), lambda each: _fastest_one(setup, each)),
        ("Cheapest?", _cheapest(setup), lambda each: _cheapest_one(setup, each)),
        ("Changed?", _changed(verdicts, None), lambda each: _changed(verdicts, each.method)),
        ("Claims?", _claims(setup, machine), None),
    ]
    parts = []
    for title, everything, own in cards:
        each_method = "" if own is None else "".join(_told(own(each), each) for each in setup.methods)
        shared = ' class="all"' if each_method else ""
        parts.append(
            f'<section class="card" aria-label="{title}"><h3>{title}</h3><div{shared}>{_lines(everything)}</div>'
            f"{each_method}</section>"
        )
    return f'<div class="cards">{"".join(parts)}</div>'


def _told(told: Told, each: MethodResult) -> str:
    return f'<div class="one" data-method="{html.escape(each.method)}" hidden>{text(each.name)}: {_lines(told)}</div>'


def _lines(told: Told) -> str:
    headline, below = told
    return f"<strong>{headline}</strong><small>{below}</small>"


def _fits(setup: Setup) -> Told:
    known = [each for each in setup.methods if each.needs_bytes is not None]
    if not known:
        return ABSENT, "no plan of these methods for a GPU"
    of_all = next((size for size in GPU_SIZES if all(each.fits(size) for each in known)), None)
    least, most = (pick(known, key=lambda each: each.needs_bytes or 0) for pick in (min, max))
    below = f"{text(least.name)} {size(least.needs_bytes)}"
    if most is not least:
        below += f" to {text(most.name)} {size(most.needs_bytes)}"
    below += ", with the CUDA context"
    if of_all is not None and GPU_SIZES.index(of_all) <= GPU_SIZES.index(USUAL_SIZE):
        return f"✓ {_all(known)} on {_gigabytes(of_all)}", below
    number_that_fit = sum(bool(each.fits(USUAL_SIZE)) for each in known)
    return f"{number_that_fit} of {len(known)} on {_gigabytes(USUAL_SIZE)}", below


def _all(known: Sequence[MethodResult]) -> str:
    return f"all {len(known)}" if len(known) > 1 else text(known[0].name)


def _fits_one(each: MethodResult) -> Told:
    if each.needs_bytes is None:
        return ABSENT, "no plan for a GPU"
    least = next((size for size in GPU_SIZES if each.fits(size)), None)
    head = f"✓ from {_gigabytes(least)} on" if least else f"✗ not on {_gigabytes(GPU_SIZES[-1])}"
    return head, f"needs {size(each.needs_bytes)}, with the CUDA context"


def _gigabytes(advertised: str) -> str:
    return f"{advertised.removesuffix('GB')} GB"


def _fastest(setup: Setup) -> Told:
    fastest = fastest_of(setup.methods)
    if not fastest or fastest[0].ratio is None:
        return ABSENT, "no step was timed here"
    alike = f"; alike: {text(', '.join(each.name for each in fastest[1:]))}" if fastest[1:] else ""
    return text(fastest[0].name), f"{plain(fastest[0].ratio.value, '{:.2f}')} × a forward of the base{alike}"


def _fastest_one(setup: Setup, each: MethodResult) -> Told:
    if each.ratio is None:
        return ABSENT, "not timed here"
    order = sorted(one.ratio.value for one in setup.methods if one.ratio is not None)
    return f"{plain(each.ratio.value, '{:.2f}')} ×", (
        f"a forward of the base{_interval(each)}; place {order.index(each.ratio.value) + 1} of {len(order)}"
    )


def _interval(each: MethodResult) -> str:
    if each.ratio is None or each.ratio.low is None or each.ratio.high is None:
        return ""
    return f" [{plain(each.ratio.low, '{:.2f}')}, {plain(each.ratio.high, '{:.2f}')}]"


def _cheapest(setup: Setup) -> Told:
    known = [each for each in setup.methods if each.peak_bytes is not None]
    counted = [each for each in setup.methods if each.trainable_params is not None]
    fewest = min(counted, key=lambda each: each.trainable_params or 0, default=None)
    below = f"fewest parameters: {text(fewest.name)}, {plain(fewest.trainable_params, '{:,}')}" if fewest else ""
    if not known:
        return ABSENT, below or "no memory was measured or planned here"
    least = min(known, key=lambda each: each.peak_bytes or 0)
    return text(least.name), f"{size(least.peak_bytes)} at the peak, {setup.source}" + (f"; {below}" if below else "")


def _cheapest_one(setup: Setup, each: MethodResult) -> Told:
    if each.peak_bytes is None:
        return ABSENT, "no memory was measured or planned here"
    order = sorted(one.peak_bytes for one in setup.methods if one.peak_bytes is not None)
    place = f"place {order.index(each.peak_bytes) + 1} of {len(order)}"
    return size(each.peak_bytes), f"at the peak, {setup.source}; {place}"


def verdicts_of(machine: Machine) -> dict[str | None, Counter[str]] | None:
    """The verdicts of the newest comparisons by method, and all of them under ``None``; ``None`` without a base."""
    compared = [each for each in machine.answering if each.comparison is not None]
    if not compared:
        return None
    found: dict[str | None, Counter[str]] = {None: Counter()}
    for each in compared:
        assert each.comparison is not None
        found[None].update({name: each.comparison.counts[name] for name in VERDICTS})
        known = {
            name: subject_of(case.metrics).get("method") for name, case in page_data.case_subjects(each.run).items()
        }
        for row in each.comparison.rows:
            method = known.get(row.test)
            if method is not None and row.label is None:
                found.setdefault(method, Counter())[row.verdict] += 1
    return found


def _changed(verdicts: dict[str | None, Counter[str]] | None, method: str | None) -> Told:
    """The verdicts of the newest comparisons, of all cases or of those of ``method``."""
    if verdicts is None:
        return ABSENT, "no earlier run to compare with"
    counts = verdicts.get(method, Counter())
    if not (counts["worse"] or counts["better"]):
        head = "nothing"
    else:
        head = ", ".join(
            f'<span class="v {name}">{sign} {plain(counts[name], "{:,}")} {name}</span>'
            for name, sign in (("worse", "▲"), ("better", "▼"))
            if counts[name]
        )
    below = f"{plain(counts['same'], '{:,}')} the same, {plain(counts['inconclusive'], '{:,}')} inconclusive"
    return head, f"{below}; each newest run against the one before"


def _claims(setup: Setup, machine: Machine) -> Told:
    if not machine.claims:
        return ABSENT, "this machine decided no claim"
    counts = Counter(claim.verdict for claim in machine.claims)
    own = Counter(claim.verdict for claim in machine.claims if claim.model == setup.model)
    head = f"{plain(counts['holds'], '{:,}')} hold, {plain(counts['refuted'], '{:,}')} refuted"
    rest = sum(counts.values()) - counts["holds"] - counts["refuted"]
    below = f"{plain(rest, '{:,}')} undecided"
    if own:
        below += f"; on {text(setup.model)} {plain(own['holds'], '{:,}')} hold, {plain(own['refuted'], '{:,}')} refuted"
    return head, below


# The grid


def _grid(place: int, setup: Setup, looks: Mapping[str, Look]) -> str:
    headings = ["method", "peak memory", "step / base forward", "step", "quality", "trainable", "% of base", "on disk"]
    most = {
        "peak": max((each.peak_bytes or 0 for each in setup.methods), default=0),
        "ratio": max((each.ratio.value for each in setup.methods if each.ratio is not None), default=0.0),
    }
    lines: list[Line] = [
        (
            {"machine": setup.machine, "model": setup.model, "method": each.method},
            [
                f"{swatch(looks[each.name])}{text(each.name)}",
                _bar(size(each.peak_bytes), each.peak_bytes, most["peak"], looks[each.name]),
                _bar(_ratio(each), None if each.ratio is None else each.ratio.value, most["ratio"], looks[each.name]),
                seconds(each.step_seconds),
                _quality(each),
                plain(each.trainable_params, "{:,}"),
                plain(each.percent_of_base, "{:.4f}"),
                size(each.disk_bytes),
                *(fits(each.fits(advertised)) for advertised in GPU_SIZES),
                text(each.runs),
            ],
        )
        for each in setup.methods
    ]
    caption = f"The methods of {setup.where}, {setup.source}; newest run {setup.ended:%Y-%m-%d}"
    return table(f"t-grid-{place}", caption, [*headings, *map(_gigabytes, GPU_SIZES), "run"], lines, sortable=True)


def _bar(shown: str, value: float | None, most: float, look: Look) -> str:
    if value is None or not most:
        return shown
    return f'{shown}<span class="bar m{look.place}" style="width:{100 * value / most:.1f}%" aria-hidden="true"></span>'


def _ratio(each: MethodResult) -> str:
    if each.ratio is None:
        return ABSENT
    why = "; ".join(each.unsteady)
    unsteady = f' <span class="note" title="{html.escape(why)}">unsteady</span>' if why else ""
    return f"{plain(each.ratio.value, '{:.2f}')}<small>{_interval(each)}</small>{unsteady}"


def _quality(each: MethodResult) -> str:
    if each.quality is None:
        return ABSENT
    quality = each.quality
    spread = (
        f" [{plain(quality.low, '{:.3f}')}, {plain(quality.high, '{:.3f}')}]" if quality.seeds > 1 else ", one seed"
    )
    return f"{number(quality.mean, f'{quality.mean:.3f}')}<small>{spread}</small>"
