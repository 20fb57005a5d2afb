"""``peft-gauge bisect``: find the first release of a library that made a step slower or changed what it computes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from peft_gauge.commands.options import AnyModel, Batch, Changes, Device, Dtype, Loop, MixedPrecision, Seq, Threads
from peft_gauge.commands.tables import AsCsv, AsJson, AsMarkdown, form_of, print_csv, print_json, print_markdown
from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft_gauge.commands.progress import Display
    from peft_gauge.commands.tables import Form
    from peft_gauge.environments.bisection import BisectionResult, Probe

NOT_WORSE, FOUND = 0, 1
CHANGE = {True: "worse", False: "different"}
"""Whether the metric is a time -> the word for a release that fails the test against the first one."""


def bisect(
    library: Annotated[str, typer.Argument(help="Library to bisect, such as bitsandbytes.")],
    releases: Annotated[str, typer.Argument(metavar="FIRST..LAST", help="Range of releases, such as 0.46.0..0.50.2.")],
    metric: Annotated[
        str,
        typer.Option(help="METHOD:METRIC, such as qlora:step_seconds, lora:fingerprint or lora:fingerprint:flops."),
    ],
    beside: Annotated[
        str, typer.Option("--with", help="Requirements to install with every release, such as 'transformers<5'.")
    ] = "",
    model: AnyModel = "toy-llama",
    batch: Batch = None,
    seq: Seq = None,
    device: Device = None,
    dtype: Dtype = None,
    mixed_precision: MixedPrecision = None,
    loop: Loop = "plain",
    changes: Changes = None,
    budget: Annotated[
        float,
        typer.Option(help="Seconds of steps per release; an inconclusive release is retried with three times that."),
    ] = 60.0,
    minimum_effect: Annotated[
        float, typer.Option(help="Smallest relative change to report as worse (0.03 = 3 %).")
    ] = 0.03,
    threads: Threads = 1,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Find the first release that is worse than FIRST or, for a deterministic metric, differs from it.

    Exit code 0: LAST is not worse; 1: found the release; 2: inconclusive, or invalid input.
    """
    from peft_gauge.commands import ab_options
    from peft_gauge.commands.progress import bar
    from peft_gauge.environments import bisection, probe
    from peft_gauge.environments.build import overlays
    from peft_gauge.environments.pairs import PairRule
    from peft_gauge.environments.requirements import parse_library, parse_side

    form = form_of(as_json, as_csv, as_markdown)
    asked, name, side = probe.parse_metric(metric), parse_library(library), parse_side(beside)
    case = ab_options.cases_of([asked.method], model, batch, seq, device, dtype, mixed_precision, loop, changes or ())[
        0
    ]
    setting = ab_options.setting_of(threads, case.device)
    rule = PairRule(budget, minimum_effect)
    found = _releases(name, releases)
    prober = probe.prober(name, side, case, asked, probe.rule_for(len(found), rule), setting, found)
    change = CHANGE[asked.is_time]
    older = prober.kept.unused()
    if older is not None:
        print(f"peft-gauge: {older}", file=sys.stderr)
    heading = f"{len(found)} releases of {name}, {found[0]} to {found[-1]}, by {metric}; environments in {overlays()}"
    print(heading, file=sys.stdout if form is None else sys.stderr)
    with bar(bisection.expected_probes(len(found)), quiet=form is not None) as display:
        show = display.print if form is None else lambda text: print(text, file=sys.stderr)
        prober.say = display.say
        try:
            outcome = bisection.bisect(
                found, _telling(prober.is_usable, change, display, show), _telling(prober.probe, change, display, show)
            )
        except KeyboardInterrupt:
            ab_options.tell_interrupted(prober.kept)
            raise typer.Exit(ab_options.INTERRUPTED) from None
    prober.kept.forget()
    code, text = conclusion(name, change, outcome)
    _print(outcome, text, form)
    raise typer.Exit(code)


def _releases(library: str, limits: str) -> list[str]:
    """The releases within ``limits``, oldest first; raises `GaugeError` for fewer than two."""
    from peft_gauge.environments.build import releases
    from peft_gauge.environments.requirements import parse_range

    low, high = parse_range(limits)
    listed = releases(library)
    found = [str(version) for version in listed if low <= version <= high]
    if len(found) < 2:
        raise GaugeError(
            f"{limits} matches {len(found)} releases of {library} for this Python; give a range with at least two of: "
            f"{', '.join(map(str, listed[-12:]))}"
        )
    return found


def _print(outcome: BisectionResult, text: str, form: Form | None) -> None:
    """The conclusion; in another form than text, the probes in their order, and JSON has both."""
    rows = [{"release": each.release, "result": each.answer, "reason": each.why} for each in outcome.probes]
    if form == "json":
        first_bad = None if outcome.first_bad is None else outcome.first_bad.release
        print_json({"first_bad": first_bad, "last_good": outcome.last_good, "conclusion": text, "probes": rows})
    elif form == "csv":
        print_csv(rows, ("release", "result", "reason"))
    elif form == "markdown":
        print_markdown(("release", "result", "reason"), [list(row.values()) for row in rows])
        print(f"\n{text}")
    else:
        print(text)


def _telling(
    question: Callable[[str], Probe], change: str, display: Display, show: Callable[[str], None]
) -> Callable[[str], Probe]:
    """``question``, with each result printed as it arrives."""
    words = {"good": f"not {change}", "bad": change.upper(), "unusable": "left out", "inconclusive": "inconclusive"}

    def ask(release: str) -> Probe:
        probe = question(release)
        show(f"  {release:12}{words[probe.answer]:15}{probe.why}")
        display.advance()
        return probe

    return ask


def conclusion(library: str, change: str, outcome: BisectionResult) -> tuple[int, str]:
    """Exit code and last line; raises `GaugeError` where the result is inconclusive."""
    if outcome.reference is None:
        raise GaugeError(
            f"no release of {library} in this range runs; the last one failed with: {outcome.probes[-1].why}"
        )
    if outcome.end is None:
        raise GaugeError(f"only {library} {outcome.reference} runs in this range; nothing to compare it with")
    if outcome.end.answer == "inconclusive":
        raise GaugeError(
            f"inconclusive whether {library} {outcome.end.release} is {change} compared with {outcome.reference} "
            f"({outcome.end.why}); raise --budget"
        )
    if outcome.first_bad is None:
        return NOT_WORSE, f"{library} {outcome.end.release} is not {change}, compared with {outcome.reference}"
    bad = outcome.first_bad
    if outcome.between:
        return FOUND, (
            f"{library} {bad.release} is {change} and {outcome.last_good} is not; the change may have come "
            f"earlier, with {', '.join(outcome.between)}, which could not be judged: {bad.why}"
        )
    return FOUND, f"{library} {bad.release} is the first that is {change}; {outcome.last_good} is not: {bad.why}"
