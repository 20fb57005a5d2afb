"""``peft-gauge ab``: A/B-test one training step under two sets of package versions.

With ``--self-check`` both sides have the same versions, so that any difference comes from the host.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_gauge.commands.compare import print_comparisons
from peft_gauge.commands.options import AnyModel, Batch, Changes, Device, Dtype, Loop, MixedPrecision, Seq, Threads
from peft_gauge.commands.tables import AsCsv, AsJson, AsMarkdown, form_of
from peft_gauge.errors import GaugeError
from peft_gauge.history import store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft_gauge.commands.progress import Display
    from peft_gauge.environments.build import Environment
    from peft_gauge.environments.measurement import Keep, MethodResult, ProcessPair, Setting
    from peft_gauge.environments.pairs import PairRule
    from peft_gauge.environments.state import Kept
    from peft_gauge.environments.worker import CaseSpec
    from peft_gauge.history.comparison import RunComparison


def ab(
    a: Annotated[
        str | None,
        typer.Argument(help="Requirements of side A, such as 'peft==0.20.0'; . stands for the installed packages."),
    ] = None,
    b: Annotated[str | None, typer.Argument(help="Requirements of side B.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Methods, comma-separated or repeated (default: lora).")
    ] = None,
    model: AnyModel = "toy-llama",
    batch: Batch = None,
    seq: Seq = None,
    device: Device = None,
    dtype: Dtype = None,
    mixed_precision: MixedPrecision = None,
    loop: Loop = "plain",
    changes: Changes = None,
    budget: Annotated[
        float, typer.Option(help="Give up as inconclusive after this many seconds of steps per method.")
    ] = 60.0,
    minimum_effect: Annotated[
        float, typer.Option(help="Smallest relative change to report as worse or better (0.03 = 3 %).")
    ] = 0.03,
    threads: Threads = 1,
    rules: Annotated[
        Path | None, typer.Option(help="Rules for deterministic metrics (default: fixtures/rules.toml).")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Folder or address to save both runs to.", metavar="DIR", parser=store.place)
    ] = Path("results/ab"),
    everything: Annotated[bool, typer.Option("--all", help="Show unchanged metrics too.")] = False,
    self_check: Annotated[
        bool,
        typer.Option(
            "--self-check", help="Run A on both sides to find the smallest change this host can resolve; save no runs."
        ),
    ] = False,
    pairs: Annotated[int, typer.Option(help="Number of process pairs for --self-check.")] = 16,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """A/B-test one training step under two sets of package versions.

    The two sides are separate processes that take steps in turn.

    Exit code 0: no regression found; 1: regression; 2: invalid input, or nothing could be measured. With --self-check,
    1 means that identical code was judged worse or better.
    """
    from peft_gauge.commands import ab_options
    from peft_gauge.commands.progress import bar
    from peft_gauge.environments import decision
    from peft_gauge.environments.build import overlays, prepare
    from peft_gauge.environments.pairs import PairRule
    from peft_gauge.environments.requirements import parse_side
    from peft_gauge.environments.state import Kept
    from peft_gauge.history.rules import read_rules

    form = form_of(as_json, as_csv, as_markdown)
    if form is not None and self_check:
        raise GaugeError(f"--self-check prints text only; drop --{form}")
    a, b = _asked_sides(a, b, self_check=self_check, pairs=pairs)
    sides = parse_side(a), parse_side(b)
    cases = ab_options.cases_of(
        method or ["lora"], model, batch, seq, device, dtype, mixed_precision, loop, changes or ()
    )
    rule = PairRule(budget, minimum_effect, error=PairRule.error / len(cases))
    judged_by = read_rules(rules)
    setting = ab_options.setting_of(threads, cases[0].device)
    work = {"self_check": pairs} if self_check else {}
    checks: list[str] = []
    with bar(len(cases), quiet=form is not None) as display:
        environments = prepare(sides[0], say=display.say), prepare(sides[1], say=display.say)
        display.begin()
        kept = Kept("ab", {**_work(environments, cases, rule, threads), **work})
        older = kept.unused()
        if older is not None:
            print(f"peft-gauge: {older}", file=sys.stderr)
        try:
            if self_check:
                checks, wrong = _self_checks(environments, cases, pairs, rule, setting, kept, display)
            else:
                findings = _findings(environments, cases, rule, setting, kept, display)
        except KeyboardInterrupt:
            ab_options.tell_interrupted(kept)
            raise typer.Exit(ab_options.INTERRUPTED) from None
    if self_check:
        kept.forget()
        print(*checks, sep="\n")
        raise typer.Exit(int(wrong))
    asked = {"model": model, "budget": budget, "minimum_effect": minimum_effect, "threads": threads}
    paths = decision.save(findings, sides, asked, results)
    kept.forget()
    comparison = decision.compared(findings, paths, judged_by)
    if form is not None:
        print_comparisons([comparison], form, everything=everything)
    else:
        _show(findings, comparison, everything)
    if form is None and any(each.folder for each in environments):
        print(f"environments are kept in {overlays()}")
    if all(each.records[0].outcome != "passed" for each in findings):
        raise GaugeError(f"no case ran with A ({sides[0].name}): {findings[0].records[0].reason}")
    raise typer.Exit(comparison.exit_code())


def _asked_sides(a: str | None, b: str | None, *, self_check: bool, pairs: int) -> tuple[str, str]:
    """Both sides as texts; raises `GaugeError` for a missing side, or for two different ones with ``--self-check``."""
    from peft_gauge.environments.self_check import LEAST_PAIRS

    if self_check:
        if b not in (None, a):
            raise GaugeError("--self-check runs the same packages on both sides; give one side or none")
        if pairs < LEAST_PAIRS:
            raise GaugeError(f"--pairs must be at least {LEAST_PAIRS}, got {pairs}")
        return (a or ".",) * 2
    if a is None or b is None:
        raise GaugeError("give both sides, such as: peft-gauge ab 'peft==0.20.0' . (. is the installed packages)")
    return a, b


def _work(
    environments: tuple[Environment, Environment], cases: Sequence[CaseSpec], rule: PairRule, threads: int
) -> dict[str, Any]:
    """Everything that can change the result: an interrupted run is resumed only if all of it is equal."""
    from dataclasses import asdict

    from peft_gauge.environments.build import installed

    sides = [[each.side.requirements, dict(each.packages)] for each in environments]
    return {
        "sides": sides,
        "cases": [asdict(case) for case in cases],
        "rule": asdict(rule),
        "threads": threads,
        "installed": installed(),
    }


def _findings(
    environments: tuple[Environment, Environment],
    cases: Sequence[CaseSpec],
    rule: PairRule,
    setting: Setting,
    kept: Kept,
    display: Display,
) -> list[MethodResult]:
    """One finding per case; process pairs that were measured before an interruption are reused."""
    from peft_gauge.environments.measurement import compare_cases

    known, keep = _kept_pairs(kept, cases)
    found = {}
    for each in compare_cases(environments, cases, rule, setting, display.say, known=known, keep=keep):
        found[each.records[0].id] = each
        display.advance()
    return [found[case.id] for case in cases]


def _kept_pairs(kept: Kept, cases: Sequence[CaseSpec]) -> tuple[dict[str, list[ProcessPair]], Keep]:
    """The process pairs saved for each case, and a function that saves more."""
    from peft_gauge.environments.measurement import ProcessPair

    def read(pairs: Any) -> list[ProcessPair]:
        return [ProcessPair.from_json(each) for each in pairs]

    def keep(case_id: str, found: Sequence[ProcessPair]) -> None:
        kept.put(case_id, [each.as_json() for each in found])

    return {case.id: kept.get(case.id, read) or [] for case in cases}, keep


def _self_checks(
    environments: tuple[Environment, Environment],
    cases: Sequence[CaseSpec],
    pairs: int,
    rule: PairRule,
    setting: Setting,
    kept: Kept,
    display: Display,
) -> tuple[list[str], bool]:
    """The lines of the report on this host, and whether identical code was judged worse or better."""
    from peft_gauge.environments.measurement import measure_pairs, why_unsteady
    from peft_gauge.environments.self_check import resolution, told

    known, keep = _kept_pairs(kept, cases)
    lines: list[str] = []
    wrong = False
    for shown in measure_pairs(environments, cases, pairs, rule, setting, display.say, known=known, keep=keep):
        display.advance()
        broken = [record for record in shown[-1].records if record.outcome != "passed"]
        if broken:
            raise GaugeError(f"{broken[0].id} {broken[0].outcome}: {broken[0].reason}")
        ratios = [each.log_ratio for each in shown if each.log_ratio is not None]
        found = resolution(ratios, [each.a_first for each in shown], rule)
        wrong = wrong or found.judged.verdict in ("worse", "better")
        lead = statistics.fmean(each.lead for each in shown)
        lines += told(found, shown[0].records[0].id, lead, why_unsteady(shown))
    return lines, wrong


def _show(findings: Sequence[MethodResult], comparison: RunComparison, everything: bool) -> None:
    from rich.console import Console

    from peft_gauge.environments.decision import told_differences
    from peft_gauge.report.comparison import as_terminal

    print(as_terminal(comparison, Console().width, everything=everything), end="")
    for finding in findings:
        print(*told_differences(finding), sep="\n", end="\n" if told_differences(finding) else "")
