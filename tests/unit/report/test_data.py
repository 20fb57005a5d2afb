"""What a report is made of, from runs with known metrics: rows, changes, intervals, pictures, Markdown, bad input."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.files import slug
from peft_gauge.history.briefs import brief_of
from peft_gauge.history.comparison import compare
from peft_gauge.history.reader import Run, read_run
from peft_gauge.history.rules import read_rules
from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES, CaseRecord
from peft_gauge.report import markdown
from peft_gauge.report.charts import looks, panels, pictures, plots
from peft_gauge.report.html import (
    page,
    page_changes,
    page_claims,
    page_data,
    page_history,
    page_rows,
    page_script_data,
    page_series,
    page_tables,
)
from peft_gauge.report.html.page_claims import by_claim
from peft_gauge.report.html.page_data import Report, gather
from peft_gauge.report.html.page_history import History, RememberedRules
from tests.support import report_runs
from tests.support.paths import RESULTS
from tests.support.report_runs import PEAK, card_run, claim, memory_case, save, step_case, three_runs

# Seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

Command = Callable[..., tuple[int, str, str]]

RULES = read_rules()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    three_runs(tmp_path / "results")
    card_run(tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def report(results: Path) -> Report:
    return gather([results], RULES)


# History


def test_changes_stand_where_they_happened(report: Report) -> None:
    assert report.history is not None
    lora, full = "test_memory.py::test_peak[lora-toy-cpu]", "test_memory.py::test_peak[full-toy-cpu]"
    runs = report.history.runs
    found = {
        (runs[change.run].name, change.case.removeprefix("benchmarks/"), change.metric): change.verdict
        for change in report.history.changes
    }
    slopes = {("0002", lora, f"shapes.{place}.tensor_peak_bytes"): "worse" for place in (0, 1)}
    assert found == slopes | {
        ("0002", lora, "tensor_peak_bytes"): "worse",
        ("0003", "test_speed.py::test_step[lora-toy-cpu]", "step_seconds"): "better",
        ("0003", full, "outcome"): "worse",
        ("0003", "claim::lora-memory[toy]", "verdict"): "worse",
    }
    (grown,) = (each for each in report.history.changes if each.metric == "tensor_peak_bytes")
    assert (grown.before, grown.after) == (PEAK, PEAK + 5_120_000)
    assert "torch: 2.13.0 → 2.14.0" in grown.environment


def test_changes_of_one_day_and_metric_are_one_item(tmp_path: Path) -> None:
    for day, extra in ((1, 0), (2, 10**8)):
        for machine in (report_runs.CPU, report_runs.CPU | {"name": "other-box"}):
            save(tmp_path, day, [memory_case(f"m{i}", "toy", extra=extra * i) for i in range(6)], machine=machine)
    history = gather([tmp_path], RULES).history
    assert history is not None
    peaks, *slopes = page_changes.grouped(history)
    assert len(slopes) == 2
    assert {len(each.changes) for each in (peaks, *slopes)} == {10}
    assert peaks.largest.case.endswith("[m5-toy-cpu]")
    shown = page_changes.changed(history)
    assert "5 cases on 2 machines, most in peak m5-toy-cpu" in shown
    assert 'data-machines="cpu-box\nother-box"' in shown
    assert page_changes.difference(peaks.largest) == f"+{100 * 5 * 10**8 / PEAK:.3g} %"


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_a_time_changes_in_the_history_exactly_where_compare_says_so(processes: int, tmp_path: Path) -> None:
    """Two runs are compared in full only where that can matter: never too seldom."""
    generator = random.Random(processes)
    told = 0
    for trial in range(12):
        factor = generator.choice([1.0, 1.02, 1.3, 1.39, 1.45, 1.7, 0.5])
        folder = tmp_path / str(trial)
        ratios = [[1.0] * 6, [factor * generator.choice([1.0, 1.0, 1.03]) for _ in range(6)]]
        paths = [
            save(
                folder,
                day,
                [step_case(f"m{i}", "toy", ratio=ratio, processes=processes) for i, ratio in enumerate(side)],
            )
            for day, side in enumerate(ratios)
        ]
        base, new = map(read_run, paths)
        expected = {
            (row.test, row.verdict)
            for row in compare(base, new, RULES).rows
            if row.metric == "step_seconds" and row.verdict in ("worse", "better")
        }
        history = gather([folder], RULES).history
        assert history is not None
        assert {(change.case, change.verdict) for change in history.changes} == expected
        told += len(expected)
    assert told > 0


@pytest.mark.parametrize(
    ("moved", "found"),
    [
        ({"torch": "2.14.0"}, [(12, "step_over_control", "worse")]),
        ({"machine": report_runs.CPU | {"threads": 1}}, []),  # other hardware: no comparison
    ],
)
def test_a_level_that_no_two_runs_can_decide_is_a_change(
    moved: dict[str, Any], found: list[tuple[int, str, str]], tmp_path: Path
) -> None:
    """10 % from one process a run: between two runs, hosts differ by more."""
    generator = random.Random(3)
    for day in range(24):
        ratio = generator.gauss(1.0, 0.01) * (1.0 if day < 12 else 1.1)
        save(tmp_path, day, [step_case("lora", "toy", ratio=ratio, processes=1)], **(moved if day >= 12 else {}))
    history = gather([tmp_path], RULES).history
    assert history is not None
    assert [(change.run, change.metric, change.verdict) for change in history.changes] == found
    for change in history.changes:
        assert (change.before, change.after) == (pytest.approx(1.0, abs=0.01), pytest.approx(1.1, abs=0.01))
        assert "torch: 2.13.0 → 2.14.0" in change.environment
        assert "its level over many runs" in page_changes.changed(history)


def test_what_was_measured_elsewhere_or_otherwise_is_no_change(tmp_path: Path) -> None:
    save(tmp_path, 1, [memory_case("lora", "toy")])
    save(tmp_path, 2, [memory_case("lora", "toy", extra=10**7)], machine=report_runs.CPU | {"threads": 1})
    otherwise = memory_case("lora", "toy", extra=10**8, settings=report_runs.SETTINGS | {"seq": 128})
    save(tmp_path, 3, [otherwise], machine=report_runs.CPU | {"threads": 1})
    history = gather([tmp_path], RULES).history
    assert history is not None
    assert history.changes == []
    (peaks,) = (one for one in history.series.values() if one.metric == "tensor_peak_bytes")
    assert peaks.values == [PEAK, PEAK + 10**7, PEAK + 10**8]


def test_a_case_is_compared_with_the_last_run_that_held_it(tmp_path: Path) -> None:
    save(tmp_path, 1, [memory_case("lora", "toy")])
    save(tmp_path, 2, [step_case("lora", "toy")])
    save(tmp_path, 3, [memory_case("lora", "toy", extra=10**7)])
    report = gather([tmp_path], RULES)
    newest, before = report.machines["cpu-box"].answering
    assert newest.base is not None
    assert (newest.run.name, newest.base.name) == ("0003", "0001")
    assert (before.run.name, before.base) == ("0002", None)
    assert report.history is not None
    assert {(change.run, change.metric) for change in report.history.changes} >= {(2, "tensor_peak_bytes")}


def test_remembered_rules_are_the_rules() -> None:
    remembered = RememberedRules.of_rules(RULES)
    for metric in ("tensor_peak_bytes", "step_seconds", "never_heard_of", "tensor_peak_bytes"):
        assert remembered.of("x", metric) is RULES.of("x", metric)
        assert remembered.passes_over("x", metric) == RULES.passes_over("x", metric)


def test_an_empty_history_has_no_runs() -> None:
    assert History(RememberedRules.of_rules(RULES)).runs == []


def test_series_of_a_case_whose_metrics_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However many rows are split into columns together, a series has the runs in which its metric is a number."""
    told: list[dict[str, Any]] = [
        {"a": 1, "b": 2.0},
        {"a": 1, "b": 3.0},
        {"b": 4.0, "a": 1.0},
        {"a": "none", "b": 5.0},
        {"c": 7, "a": True},
        {"a": 2, "b": 6.0},
    ]
    for rows in (1, 2, 64):
        monkeypatch.setattr(page_series, "MOST_ROWS", rows)
        history = History(RememberedRules.of_rules(RULES))
        for number, metrics in enumerate(told, start=1):
            case = CaseRecord("t", "b", "passed", None, {**metrics, SAMPLES: {"b": [[1.0] * number]}})
            path = tmp_path / f"{number:04}_x.json"
            run = Run(path, {"name": "m"}, {}, datetime(2026, 1, number, tzinfo=UTC), {}, (case,), (), (), 3, False)
            history.add(brief_of(run))
            if number == 2:
                assert history.series["m", "t", "a"].runs == [0, 1]
        assert [key[2] for key in history.series] == ["a", "b", "c"]
        a, b, c = history.series.values()
        assert (a.runs, a.values) == ([0, 1, 2, 5], [1, 1, 1.0, 2])
        assert [*map(type, a.values)] == [int, int, float, int]
        assert (b.runs, b.values) == ([0, 1, 2, 3, 5], [2.0, 3.0, 4.0, 5.0, 6.0])
        assert b.intervals == [None, None, None, None, (1.0, 1.0)]
        assert (c.runs, c.values, c.intervals) == ([4], [7], [])


# Rows


def test_memory_rows_hold_every_category_of_measured_and_planned_steps(report: Report) -> None:
    rows = report.rows("memory")
    lora = {row["category"]: row["bytes"] for row in rows if row["machine"] == "cpu-box" and row["method"] == "lora"}
    assert lora == report_runs.CATEGORIES | {"activations": 234_567_890 + 5_120_000}
    assert not [row for row in rows if row["machine"] == "cpu-box" and row["method"] == "full"]  # out of memory
    (planned,) = (row for row in rows if row["source"] == "planned" and row["category"] == "base_weights")
    assert (planned["method"], planned["model"], planned["bytes"]) == ("qlora", "big", 4_000_000_000)


def test_each_meter_stands_beside_its_plan_and_its_ceiling(report: Report) -> None:
    rows = {(row["machine"], row["meter"]): row for row in report.rows("planned")}
    assert set(rows) == {("cpu-box", "tensors"), ("GPU-box", "allocated"), ("GPU-box", "reserved")}
    reserved = rows["GPU-box", "reserved"]
    assert [reserved[f"{kind}_bytes"] for kind in plots.KINDS] == [2_500_000_000, 2_400_000_000, 3_000_000_000]
    assert rows["cpu-box", "tensors"]["ceiling_bytes"] is None
    assert [row["kind"] for row in panels.prepared("planned", [rows["cpu-box", "tensors"]])] == ["measured", "planned"]


def test_a_line_over_lengths_needs_two(report: Report) -> None:
    rows = report.rows("sequence")
    assert {(row["machine"], row["seq"]) for row in rows} == {
        (machine, seq) for machine in ("cpu-box", "GPU-box") for seq in (64, 128)
    }
    assert "qlora" not in {row["method"] for row in rows}  # planned at one length


def test_plans_at_several_lengths_make_a_line(tmp_path: Path) -> None:
    by_seq = {"64": {"lora": 10, "full": 30}, "512": {"lora": 20, "full": 40}}
    case = CaseRecord(
        "benchmarks/test_memory_plan.py::test_cross[tiny]", "q", "passed", None, {"peak_bytes_by_seq": by_seq}
    )
    save(tmp_path, 1, [case])
    rows = gather([tmp_path], RULES).rows("sequence")
    assert [(row["model"], row["method"], row["seq"], row["bytes"]) for row in rows] == [
        ("tiny", "lora", 64, 10),
        ("tiny", "full", 64, 30),
        ("tiny", "lora", 512, 20),
        ("tiny", "full", 512, 40),
    ]


def test_a_claim_keeps_the_newest_verdict_of_its_machine(tmp_path: Path) -> None:
    """A slow run decides it, a bare one after it does not; another machine has its own."""
    save(tmp_path, 1, [], [claim("holds"), claim("inconclusive", "other")])
    save(tmp_path, 2, [], [claim("not measured yet"), claim("refuted", "other"), claim("not measured yet", "third")])
    save(tmp_path, 3, [memory_case("lora", "toy")], [])
    save(tmp_path, 4, [], [claim("refuted")], machine=report_runs.CARD)
    report = gather([tmp_path], RULES)
    found = {
        (name, one.id): (one.verdict, one.source and (one.source.run, f"{one.source.ended:%Y-%m-%d}"))
        for name, machine in report.machines.items()
        for one in machine.claims
    }
    assert found == {
        ("GPU-box", "lora-memory"): ("refuted", ("0001", "2026-02-04")),
        ("cpu-box", "lora-memory"): ("holds", ("0001", "2026-02-01")),
        ("cpu-box", "other"): ("refuted", ("0002", "2026-02-02")),
        ("cpu-box", "third"): ("not measured yet", None),
    }
    assert {id_: len(standings) for id_, standings in by_claim(report).items()} == {
        "lora-memory": 2,
        "other": 1,
        "third": 1,
    }
    shown = page_claims.claims(report)
    assert shown.count("LoRA needs &lt; 2 GB &amp; no more.") == 3  # once for each claim
    assert "<td>2026-02-01, run 0001</td><td>cpu-box</td>" in shown
    assert shown.count("<tr data-model=") == len(found)


def test_times_have_their_interval(report: Report) -> None:
    rows = {row["method"]: row for row in report.rows("times")}
    assert set(rows) == {"lora", "full"}
    lora = rows["lora"]
    assert (lora["seconds"], lora["rounds"], lora["processes"], lora["over_control"]) == (1.5, 50, 5, 1.5)
    assert lora["low_seconds"] <= 1.5 <= lora["high_seconds"] <= 1.5 * 1.03 * 1.004


def test_the_front_of_a_sweep_is_what_no_other_point_dominates(report: Report) -> None:
    rows = report.rows("quality")
    assert {row["label"]: row["front"] for row in rows} == {"r=4": True, "r=16": True, "r=64": False, "r=256": False}
    assert {row["cost"] for row in rows} == {"step_seconds"}


def test_a_sweep_stays_when_later_runs_ask_for_less(tmp_path: Path) -> None:
    """And of two runs with the same sweep it is the newer that is shown."""
    for number, qualities in enumerate([(0.1, 0.2), (0.3, 0.4), None]):
        points = [{"label": f"r{place}", "bytes": 10 + place, "quality": q} for place, q in enumerate(qualities or ())]
        sweep = CaseRecord("benchmarks/test_s.py::test_sweep", "test_s", "passed", metrics={"pareto": points})
        other = CaseRecord("benchmarks/test_o.py::test_other", "test_o", "passed")
        save(tmp_path, number, [sweep, other] if qualities else [other])
    rows = gather([tmp_path], RULES).rows("quality")
    assert [row["quality"] for row in rows] == [0.3, 0.4]


def test_a_sweep_says_what_its_quality_is(tmp_path: Path) -> None:
    points = [{"label": "switching", "held_bytes": 10, "quality": 0.5}]
    trained = CaseRecord("benchmarks/test_s.py::test_sweep", "test_s", "passed", metrics={"pareto": points})
    served = CaseRecord(
        "benchmarks/test_m.py::test_ways",
        "test_m",
        "passed",
        metrics={"pareto": points, "quality_is": "rows per forward of the base"},
    )
    save(tmp_path, 0, [trained, served])
    rows = gather([tmp_path], RULES).rows("quality")
    assert [(row["task"], row["cost"], row["quality_is"]) for row in rows] == [
        ("Sweep?", "held_bytes", "quality"),
        ("Ways?", "held_bytes", "rows per forward of the base"),
    ]
    for row in rows:
        assert "test_" not in row["panel"]


def test_a_plain_run_of_pytest_benchmark_is_shown_too(tmp_path: Path) -> None:
    stats = {"median": 0.002, "data": [0.001, 0.002, 0.002, 0.003, 0.002, 0.002]}
    plain = {
        "machine_info": {"node": "elsewhere"},
        "commit_info": {},
        "benchmarks": [{"fullname": "tests/test_x.py::test_y", "stats": stats}],
        "datetime": "2026-01-01T00:00:00",
        "version": "5.0.0",
    }
    (tmp_path / "Linux").mkdir()
    (tmp_path / "Linux" / "0001_x.json").write_text(json.dumps(plain))
    report = gather([tmp_path], RULES)
    (row,) = report.rows("times")
    assert (row["machine"], row["label"], row["seconds"]) == ("Linux", "tests/test_x.py::test_y", 0.002)
    assert (row["low_seconds"], row["high_seconds"]) == (0.001, 0.003)


def test_the_saved_runs_of_this_repository_can_be_reported() -> None:
    report = gather([RESULTS], RULES)
    assert report.left_out == []
    for name, machine in report.machines.items():
        peaks = {
            (plan["model"], plan["method"], plan["settings"]["batch"], plan["settings"]["seq"]): plan["peak_bytes"]
            for answering in machine.answering
            for plan in page_rows.plans_of(answering.run)
        }
        bars: dict[tuple[str, str], int] = {}
        for row in report.rows("memory"):
            if row["source"] == "planned" and row["machine"] == name:
                bars[row["panel"], row["label"]] = bars.get((row["panel"], row["label"]), 0) + row["bytes"]
        assert sorted(bars.values()) == sorted(peaks.values())


# Pictures


@pytest.mark.parametrize(("form", "magic"), [("svg", b"<svg"), pytest.param("png", b"\x89PNG", marks=pytest.mark.slow)])
def test_a_dozen_pictures_are_named_for_what_they_show(
    form: str, magic: bytes, report: Report, results: Path, tmp_path: Path, run_command: Command
) -> None:
    out = tmp_path / "pictures"
    code, printed, complaint = run_command("report", str(results), "--format", form, "-o", str(out))
    saved = sorted(out.iterdir())
    assert (code, complaint) == (0, "")
    assert printed == f"wrote {len(saved)} pictures to {out}\n"
    assert len(saved) == 12
    assert all(path.read_bytes().startswith(magic) and path.suffix == f".{form}" for path in saved)
    assert {path.stem for path in saved if not path.stem.endswith("-dark")} == {
        path.stem.removesuffix("-dark") for path in saved if path.stem.endswith("-dark")
    }
    for title in panels.PLOTTED:
        assert any(path.name.startswith(slug(panels.TITLES[title])) for path in saved)


def drawn_memory(report: Report, *, dark: bool = False) -> str:
    rows = [row for row in panels.prepared("memory", report.rows("memory")) if row["machine"] == "cpu-box"]
    return pictures.picture("memory", rows, looks.looks_of(["lora"]), "svg", dark=dark).decode()


def test_a_picture_names_what_it_shows_on_any_ground(report: Report) -> None:
    light, dark = drawn_memory(report), drawn_memory(report, dark=True)
    for drawn in (light, dark):
        assert "Where does the memory go?" in drawn
        assert "toy on cpu, 1×64 tokens, float32, cpu-box" in drawn
        assert "W base weights" in drawn
        assert ">V<" in drawn  # the letter in the segment of activations
        assert "NaN" not in drawn
        assert 'fill="white"' not in drawn.split("<g")[0]  # no ground of its own
    assert looks.BLACK[0] in light
    assert looks.BLACK[0] not in dark
    assert looks.BLACK[1] in dark


def test_methods_differ_by_more_than_colour() -> None:
    found = looks.looks_of([*looks.METHODS, *(f"m{i}" for i in range(42))])
    assert len(set(found.values())) == 49
    assert len({found[method].shape for method in looks.METHODS}) == 7
    assert len({found[method].light for method in looks.METHODS}) == 7
    assert len({letter for letter, _ in plots.CATEGORIES.values()}) == len(plots.CATEGORIES)


def test_a_method_has_one_look_whatever_else_is_there() -> None:
    assert looks.looks_of(["qlora"])["qlora"] == looks.looks_of(["other", "lora", "qlora"])["qlora"]
    assert looks.looks_of(["b", "a"]) == looks.looks_of(["a", "b"])
    variants = looks.looks_of(["qlora", "qlora-unprepared", "QLoRA r2"])
    assert len({look.place for look in variants.values()}) == 1
    assert len({look.shape for look in variants.values()}) == 3


# Markdown


def test_markdown_tells_the_newest_run(results: Path, run_command: Command) -> None:
    code, printed, complaint = run_command("report", "--markdown", str(results / "cpu-box"))
    assert (code, complaint) == (0, "")
    assert printed.startswith("## cpu-box, run 0003\n\n- ended 2026-02-03 12:00 UTC\n")
    assert "- cases: 3 passed, 1 out-of-memory, 1 skipped\n- claims: 1 refuted, 1 inconclusive\n" in printed
    assert "torch 2.14.0, peft 0.21.2" in printed
    assert "bitsandbytes" not in printed  # which was not installed
    assert "| lora, tensors | toy on cpu, 1×64 tokens, float32, cpu-box | 1.24 GB | 1.20 GB | 103.3 % | – |" in printed
    assert "| out-of-memory | test\\_memory.py::test\\_peak\\[full-toy-cpu\\] | the GPU's 24 GB were full |" in printed
    assert "| skipped | test\\_memory.py::test\\_peak\\[qlora-toy-cpu\\] | no &lt;CUDA&gt; |" in printed
    assert "1.50 s" in printed
    widths = {line.count(" | ") for line in printed.splitlines() if line.startswith("| lora | ")}
    assert len(widths) == 1


def test_markdown_says_that_a_ceiling_was_passed(results: Path, run_command: Command) -> None:
    _, printed, _ = run_command("report", "--markdown", str(results / "GPU-box"))
    assert "- accelerator: NVIDIA H100, 85.00 GB\n" in printed
    assert "| 2.00 GB | 1.20 GB | 166.7 % | 1.90 GB, EXCEEDED BY 100.00 MB |" in printed
    assert "| 2.50 GB | 2.40 GB | 104.2 % | 3.00 GB |" in printed
    assert "| qlora | big | 1×64 tokens, float32 | 4.00 GB | 5.00 GB | – | – | backward |" in printed


def test_markdown_tells_what_settings_of_a_sweep_reached(results: Path, run_command: Command) -> None:
    _, printed, _ = run_command("report", "--markdown", str(results / "GPU-box"))
    assert "### test\\_rank\\[toy\\]: toy\n\n| setting | step | quality | over seeds | diverged |" in printed
    assert "| r=16 | 2.00 s | 0.7500 | 0.7000 to 0.8000 | 0 of 3 |" in printed
    assert "| r=256 | 500.00 ms | – | – | 1 of 3 |" in printed
    assert "\n\nquality: mean over seeds, higher is better; peak: planned.\n" in printed


def test_markdown_takes_one_file_and_names_every_machine_of_a_folder(results: Path, run_command: Command) -> None:
    first = page_data.find([results / "cpu-box"])[0][0]
    assert run_command("report", "--markdown", str(first))[1].startswith("## cpu-box, run 0001\n")
    everything = run_command("report", "--markdown", str(results))[1]
    headings = [line for line in everything.splitlines() if line.startswith("## ")]
    assert headings == ["## GPU-box, run 0001", "## cpu-box, run 0003"]


def test_markdown_keeps_a_cell_a_cell() -> None:
    assert markdown.escape("a|b\n*c* <d> & `e`") == "a\\|b \\*c\\* &lt;d&gt; &amp; \\`e\\`"


def test_markdown_says_that_a_run_was_interrupted(tmp_path: Path, run_command: Command) -> None:
    path = save(tmp_path, 1, [memory_case("lora", "toy")], [claim("holds")])
    document = json.loads(path.read_text())
    document["peft_gauge"]["interrupted"] = True
    path.write_text(json.dumps(document))
    assert "**interrupted before all its cases**" in run_command("report", "--markdown", str(path))[1]


# Bad input


@pytest.mark.parametrize("arguments", [["--markdown"], ["-o", "{out}"]])
def test_a_broken_file_among_many_is_named_and_left_out(
    arguments: list[str], results: Path, tmp_path: Path, run_command: Command
) -> None:
    broken = results / "cpu-box" / "0009_broken.json"
    broken.write_text('{"benchmarks": [')
    out = tmp_path / "out"
    code, _, complaint = run_command("report", *(each.format(out=out) for each in arguments), str(results))
    assert code == 0
    (line,) = complaint.splitlines()
    assert line.startswith(f"peft-gauge: left out: {broken} is truncated")


@pytest.mark.parametrize("form", [["--markdown"], []])
@pytest.mark.parametrize("kind", ["missing", "empty", "broken", "other"])
def test_where_nothing_is_left_one_line_says_why(
    kind: str, form: list[str], tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    if kind != "missing":
        folder.mkdir()
    if kind in ("broken", "other"):
        (folder / "0001_x.json").write_text("{" if kind == "broken" else "[]")
    code, printed, complaint = run_command("report", *form, str(folder))
    assert (code, printed) == (2, "")
    assert complaint.count("\n") == 1
    assert str(folder) in complaint
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "pdf"], "unknown format 'pdf'"),
        (["--markdown", "-o", "x"], "--markdown prints"),
        (["-o", "."], "is a folder"),
        (["-o", "no/such/report.html"], "cannot write no/such/report.html"),
        (["--format", "svg", "-o", "{a file}"], "is a file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], said: str, results: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(results.parent)
    Path("{a file}").touch()
    code, printed, complaint = run_command("report", *arguments)
    assert (code, printed, complaint.count("\n")) == (2, "", 1)
    assert said in complaint


def test_without_the_extra_one_line_says_how_to_install_it(
    results: Path, tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("altair", "vl_convert"):
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, module, None)
            code, _, complaint = run_command("report", str(results), "-o", str(tmp_path / "x.html"))
            assert code == 2
            assert complaint == f"peft-gauge: a report needs {module}; install it: pip install -e '.[report]'\n"
            assert run_command("report", "--markdown", str(results))[0] == 0  # which needs nothing


def test_nothing_left_names_the_first_of_many() -> None:
    assert page_data.nothing_left(["a is empty", "b is empty"]) == "a is empty (and 1 more that could not be used)"
    with pytest.raises(GaugeError, match="no saved run was given"):
        gather([], RULES)


def test_samples_themselves_are_not_kept(report: Report) -> None:
    assert report.history is not None
    assert not {one.metric for one in report.history.series.values()} & {SAMPLES, CONTROL_SAMPLES}


# Long histories


def test_of_a_long_history_the_page_shows_a_part_and_every_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_history, "MOST_RUNS", 6)
    monkeypatch.setattr(page_history, "NEWEST_RUNS", 3)
    for day in range(20):
        extra = 5_120_000 if day >= 9 else 0
        save(tmp_path, day, [memory_case("lora", "toy", extra=extra), step_case("lora", "toy", ratio=3 + day / 1000)])
    save(tmp_path, 20, [memory_case("lora", "toy")], machine=report_runs.CARD)
    history = gather([tmp_path], RULES).history
    assert history is not None
    embedded = page_script_data.history_data(history)
    series = {
        (embedded["machines"][machine], embedded["metrics"][metric]): (
            [embedded["runs"][run][1] for run in embedded["at"][at]],
            values,
        )
        for machine, _, metric, at, values, *_ in embedded["series"]
    }
    drawn = ["0001", "0006", "0012", "0018", "0019", "0020"]  # the newest three, and three of those before
    names, values = series["cpu-box", "step_seconds"]
    assert (names, values) == (drawn, [3.0, 3.005, 3.011, 3.017, 3.018, 3.019])
    names, values = series["cpu-box", "tensor_peak_bytes"]
    assert names == sorted([*drawn, "0010"])  # where it changed
    assert values == [[PEAK, 2], [PEAK + 5_120_000, 5]]
    assert [embedded["runs"][run][1] for run, _, _, _ in embedded["changes"]] == ["0010"] * len(embedded["changes"])
    assert series["GPU-box", "tensor_peak_bytes"] == (["0001"], [PEAK])
    assert page_tables.runs(history).count("<tr") == 1 + 7
    assert "7 of 21 runs" in page_tables.runs(history)


def test_a_short_history_is_whole(report: Report) -> None:
    assert report.history is not None
    assert report.history.shown_runs() == set(range(len(report.history.runs)))
    assert "left out" not in page._history_section(report.history)
    assert "All runs" in page_tables.runs(report.history)
