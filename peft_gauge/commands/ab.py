"""``peft-gauge ab``: the same training step under two sets of library versions, in turn, until it is clear.

With ``--self-check`` under one and the same set: then what it sees is the host.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path  # typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft_gauge.environments.build import Environment
    from peft_gauge.environments.measurement import Finding, Keep, ProcessPair, Setting
    from peft_gauge.environments.pairs import PairRule
    from peft_gauge.environments.progress import Display
    from peft_gauge.environments.state import Kept
    from peft_gauge.environments.worker import CaseSpec
    from peft_gauge.history.comparison import Comparison


def ab(
    a: Annotated[
        str | None, typer.Argument(help="Requirements of A, such as 'peft==0.20.0'; . is what is installed.")
    ] = None,
    b: Annotated[str | None, typer.Argument(help="Requirements of B.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method; repeatable, or with commas. Default: lora.")
    ] = None,
    model: Annotated[str, typer.Option(help="A record's name, a folder, a GGUF file or a hub id.")] = "toy-llama",
    batch: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base. Default: float32 on cpu, bfloat16 on cuda.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds of steps after which a method stays undecided.")] = 60.0,
    minimum_effect: Annotated[
        float, typer.Option(help="Smallest relative change to call worse or better (0.03 = 3 %).")
    ] = 0.03,
    threads: Annotated[int, typer.Option(help="Threads of either side.")] = 1,
    rules: Annotated[Path | None, typer.Option(help="How figures without noise are judged.")] = None,
    results: Annotated[Path, typer.Option(help="Where both runs are saved.")] = Path("results/ab"),
    everything: Annotated[bool, typer.Option("--all", help="Show also what stayed the same.")] = False,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="A on both sides: what can this host resolve? Saves no runs.")
    ] = False,
    pairs: Annotated[int, typer.Option(help="Pairs of processes of --self-check.")] = 16,
) -> None:
    """Is B slower than A, does it need more, does it do anything else? Both run at once and step in turn.

    Exit code 0: nothing is worse, or it cannot be told; 1: something is; 2: the question cannot be put. Of
    --self-check 0, or 1 where the same code was called worse or better.
    """
    from peft_gauge.commands import ab_options
    from peft_gauge.environments import decision
    from peft_gauge.environments.build import overlays, prepare
    from peft_gauge.environments.pairs import PairRule
    from peft_gauge.environments.progress import bar
    from peft_gauge.environments.requirements import parse_side
    from peft_gauge.environments.state import Kept
    from peft_gauge.history.rules import read_rules

    a, b = _asked_sides(a, b, self_check=self_check, pairs=pairs)
    sides = parse_side(a), parse_side(b)
    cases = ab_options.cases_of(method or ["lora"], model, batch, seq, device, dtype)
    rule = PairRule(budget, minimum_effect, error=PairRule.error / len(cases))
    judged_by = read_rules(rules)
    setting = ab_options.setting_of(threads, cases[0].device)
    work = {"self_check": pairs} if self_check else {}
    checks: list[str] = []
    with bar(len(sides) + len(cases)) as display:
        environments = prepare(sides[0], say=display.say), prepare(sides[1], say=display.say)
        display.advance(len(sides))
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
    _show(findings, comparison, everything)
    if any(each.folder for each in environments):
        print(f"environments are kept in {overlays()}")
    if all(each.records[0].outcome != "passed" for each in findings):
        raise GaugeError(f"nothing ran with A ({sides[0].name}): {findings[0].records[0].reason}")
    raise typer.Exit(comparison.exit_code())


def _asked_sides(a: str | None, b: str | None, *, self_check: bool, pairs: int) -> tuple[str, str]:
    """Both sides as texts; raises `GaugeError` where there are not as many as the question needs."""
    from peft_gauge.environments.self_check import LEAST_PAIRS

    if self_check:
        if b not in (None, a):
            raise GaugeError("--self-check takes the same code on both sides; give one side, or none for the installed")
        if pairs < LEAST_PAIRS:
            raise GaugeError(f"--pairs must be at least {LEAST_PAIRS}, not {pairs}")
        return (a or ".",) * 2
    if a is None or b is None:
        raise GaugeError("give both sides, such as: peft-gauge ab 'peft==0.20.0' . (. is what is installed)")
    return a, b


def _work(
    environments: tuple[Environment, Environment], cases: Sequence[CaseSpec], rule: PairRule, threads: int
) -> dict[str, Any]:
    """All that changes what comes out."""
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
) -> list[Finding]:
    """What each case shows; pairs of processes that were measured before an interruption count."""
    from peft_gauge.environments.measurement import compare_cases

    known, keep = _kept_pairs(kept, cases)
    found = {}
    for each in compare_cases(environments, cases, rule, setting, display.say, known=known, keep=keep):
        found[each.records[0].id] = each
        display.advance()
    return [found[case.id] for case in cases]


def _kept_pairs(kept: Kept, cases: Sequence[CaseSpec]) -> tuple[dict[str, list[ProcessPair]], Keep]:
    """The pairs of processes that are ``kept`` of each case, and what keeps further ones."""
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
    """What each case shows of this host, in lines, and whether the same code was called worse or better."""
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


def _show(findings: Sequence[Finding], comparison: Comparison, everything: bool) -> None:
    from rich.console import Console

    from peft_gauge.environments.decision import told_differences
    from peft_gauge.report.comparison import as_terminal

    print(as_terminal(comparison, Console().width, everything=everything), end="")
    for finding in findings:
        print(*told_differences(finding), sep="\n", end="\n" if told_differences(finding) else "")
