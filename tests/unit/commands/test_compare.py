"""`peft-gauge compare` as a user meets it: exit codes, one line for what is wrong, and outputs that agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.history.comparison import Row
from peft_gauge.history.intervals import Judgement
from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES, VERSION
from peft_gauge.report.comparison import HEADINGS, cells
from tests.support.facts import lacking
from tests.support.paths import ROOT

Command = Callable[..., tuple[int, str, str]]

MACHINE = {"name": "a-2c-cpu", "python_version": "3.11.7", "threads": 2, "accelerator": {"name": None}}
IDS = [f"benchmarks/test_speed.py::test_step[{name}-toy-cpu]" for name in ("full", "lora", "ia3")]
JUDGED = Judgement("same", ratio=1.0, low=0.99, high=1.01, error=0.05, further=None)
CONTROL = [[1.0, 1.1, 0.9], [1.0, 1.2, 1.1], [0.9, 1.0, 1.0]]


def metrics(slower: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Three processes whose rounds are always ``slower`` times 3 controls, but for a thousandth."""
    seconds = [
        [3 * slower * control * (1 + 0.001 * process) for control in rounds] for process, rounds in enumerate(CONTROL)
    ]
    return {
        "trainable_params": 1_843_200,
        "allocated_peak_bytes": 1_234_567_890,
        SAMPLES: {"step_seconds": seconds},
        CONTROL_SAMPLES: {"step_seconds": CONTROL},
    } | changes


def save(
    path: Path, *changed: dict[str, Any], machine: dict[str, Any] | None = None, section: dict[str, Any] | None = None
) -> str:
    """A run of three cases, the first of them with the ``changed`` metrics; the path as the command takes it."""
    of_each = [*changed, *[metrics() for _ in IDS]][: len(IDS)]
    cases = [
        {"id": id_, "benchmark": "test_speed", "outcome": "passed", "reason": None, "metrics": each}
        for id_, each in zip(IDS, of_each, strict=True)
    ]
    whole = {
        "machine_info": MACHINE | (machine or {}),
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [],
        "datetime": "2026-11-24T20:00:00+00:00",
        "version": "5.0.0",
        "peft_gauge": {"schema": VERSION, "options": {}, "interrupted": False, "cases": cases, "claims": []}
        | (section or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole))
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return save(tmp_path / "0001_base.json")


# Exit codes


@pytest.mark.parametrize(
    ("change", "code", "verdict"),
    [
        ({}, 0, "same"),
        ({"slower": 1.1}, 1, "worse"),
        ({"slower": 0.9}, 0, "better"),
        ({"trainable_params": 1_843_201}, 1, "worse"),
        ({"allocated_peak_bytes": 1_000_000_000}, 0, "better"),
    ],
)
def test_the_exit_code_says_whether_anything_got_worse(
    change: dict[str, Any], code: int, verdict: str, base: str, tmp_path: Path, run_command: Command
) -> None:
    new = save(tmp_path / "0002_new.json", metrics(**change))
    found, printed, complaint = run_command("compare", base, new)
    assert (found, complaint) == (code, "")
    counts = printed.splitlines()[0].partition(": ")[2]
    assert counts.startswith("1 worse" if verdict == "worse" else "0 worse")
    assert ("1 better" in counts) == (verdict == "better")
    assert (verdict in printed.partition("\n")[2]) == (verdict != "same")


def test_a_missing_case_fails_only_when_strict(base: str, tmp_path: Path, run_command: Command) -> None:
    kept = json.loads(Path(base).read_text())["peft_gauge"]["cases"][:2]
    new = save(tmp_path / "0002_new.json", section={"cases": kept})
    assert run_command("compare", base, new)[0] == 0
    out = tmp_path / "out.json"
    code, printed, _ = run_command("compare", base, new, "--strict", "--json", str(out))
    assert code == 1
    assert "MISSING" in printed
    assert json.loads(out.read_text())["comparisons"][0]["exit_code"] == 1


def test_every_new_run_is_compared_with_the_base(base: str, tmp_path: Path, run_command: Command) -> None:
    runs = [save(tmp_path / f"000{n}.json", metrics(slower=slower)) for n, slower in ((2, 1.0), (3, 1.2), (4, 1.0))]
    code, printed, _ = run_command("compare", base, *runs)
    assert code == 1
    assert [line for line in printed.splitlines() if " against " in line] == [f"{run} against {base}" for run in runs]
    assert printed.count(" same") == 3


def test_same_rows_are_shown_on_request(base: str, run_command: Command) -> None:
    short, whole = (run_command("compare", base, base, *extra)[1] for extra in ((), ("--all",)))
    assert "trainable_params" not in short
    assert whole.count("trainable_params") == 3


# Which runs


def test_a_folder_is_its_newest_run(base: str, tmp_path: Path, run_command: Command) -> None:
    folder = tmp_path / "results" / "a-2c-cpu"
    save(folder / "0009_x.json")
    save(folder / "0010_x.json", metrics(slower=1.2))
    for named in (folder, folder.parent):
        code, printed, _ = run_command("compare", base, str(named))
        assert code == 1
        assert "0010_x.json against" in printed


def test_the_last_runs_of_a_machine(tmp_path: Path, run_command: Command) -> None:
    results = tmp_path / "results"
    for number in (1, 2, 3):
        save(results / "a-2c-cpu" / f"000{number}_x.json", metrics(slower=1.2 if number == 1 else 1.0))
    options = ("--results", str(results), "--machine", "a-2c-cpu")
    code, printed, _ = run_command("compare", "--last", "2", *options)
    assert code == 0
    assert "0003_x.json against" in printed
    assert "0002_x.json" in printed
    assert "0001_x.json" not in printed
    assert run_command("compare", "--last", "3", *options)[1].count("1 better") == 2


def other_benchmark(name: str) -> dict[str, Any]:
    id_ = f"benchmarks/test_verdicts.py::test_{name}"
    return {"id": id_, "benchmark": "test_verdicts", "outcome": "passed", "reason": None, "metrics": {}}


def test_runs_of_other_benchmarks_are_passed_over(tmp_path: Path, run_command: Command) -> None:
    folder = tmp_path / "results" / "a-2c-cpu"
    save(folder / "0001_x.json")
    save(folder / "0002_x.json", section={"cases": [other_benchmark("simulated")]})
    save(folder / "0003_x.json", metrics(slower=1.2))
    save(folder / "0004_x.json", section={"cases": [other_benchmark("real")]})
    options = ("--results", str(tmp_path / "results"), "--machine", "a-2c-cpu")
    for arguments in (["--last", "2", *options], [str(folder)], [str(folder.parent)], [str(folder), str(folder)]):
        code, printed, _ = run_command("compare", *arguments)
        assert code == 1
        _, first, second, *_ = printed.splitlines()
        assert first == f"{folder / '0003_x.json'} against {folder / '0001_x.json'}"
        assert second == "note: passed over, without cases in common: 0004, 0002"
    out = tmp_path / "x.json"
    _, markdown, _ = run_command("compare", "--last", "2", *options, "--markdown", "--json", str(out))
    assert "- note: passed over, without cases in common: 0004, 0002\n" in markdown
    assert "passed over" in json.loads(out.read_text())["comparisons"][0]["notes"][0]


def test_one_run_is_compared_with_the_newest_before_it_that_it_can_be(tmp_path: Path, run_command: Command) -> None:
    save(tmp_path / "0001_x.json", metrics(slower=1.2))
    save(tmp_path / "0002_x.json")
    save(tmp_path / "0003_x.json", section={"cases": [other_benchmark("real")]})
    new = save(tmp_path / "0004_x.json", metrics(slower=1.2))
    save(tmp_path / "0005_x.json")  # after it, and none of its business
    code, printed, _ = run_command("compare", new)
    assert code == 1
    assert printed.splitlines()[1] == f"{new} against {tmp_path / '0002_x.json'}"
    assert run_command("compare", str(tmp_path / "0002_x.json"))[0] == 0


def test_without_a_name_the_last_runs_are_this_machine_s(
    tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_gauge.machine.machine_info", lambda: {"name": "mine"})
    for number in (1, 2):
        save(tmp_path / "mine" / f"000{number}_x.json")
        save(tmp_path / "other" / f"000{number}_x.json", metrics(slower=number))
    assert run_command("compare", "--last", "2", "--results", str(tmp_path))[0] == 0


def test_own_rules(base: str, tmp_path: Path, run_command: Command) -> None:
    new = save(tmp_path / "new.json", metrics(trainable_params=5))
    rules = tmp_path / "rules.toml"
    rules.write_text(
        'family_error = 0.05\nhost_spread = {seconds = 2, over_control = 2}\nrules = [{metric = "*", kind = "ignore"}]'
    )
    assert [run_command("compare", base, new, *extra)[0] for extra in ((), ("--rules", str(rules)))] == [1, 0]


# What is wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "BASE and at least one NEW, or --last N"),
        (["{base}"], "; give BASE, too"),
        (["{folder}/apart/m/0002_x.json"], "none of the 1 runs before it"),
        (["--last", "2", "--machine", "m", "--results", "{folder}/apart"], "no 2 of the 2 runs in "),
        (["{base}", "{folder}/none.json"], "none.json does not exist"),
        (["{base}", "{folder}/broken.json"], "broken.json is truncated"),
        (["{base}", "{folder}/newer.json"], "was written by a newer peft-gauge"),
        (["{base}", "{folder}/empty"], "empty contains no saved runs"),
        (["{base}", "{folder}/two"], "contains runs of several machines; name one: "),
        (["--last", "1"], "--last must be at least 2, got 1"),
        (["--last", "2", "{base}", "{base}"], "give runs or --last, not both"),
        (["--last", "2", "--machine", "m", "--results", "{folder}/two"], "two/m has 1 saved runs"),
        (["--last", "2", "--machine", "m", "--results", "{folder}/none"], "none is not a folder of saved runs"),
        (["{base}", "{folder}/other.json"], "the machines differ (machine: a-2c-cpu → b; threads: 2 → 4)"),
        (["{base}", "{base}", "--rules", "{folder}/broken.json"], "broken.json is not TOML"),
        (["{base}", "{base}", "--json", "{folder}/none/x.json"], "cannot write "),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_compared_is_one_line(
    arguments: list[str], said: str, base: str, tmp_path: Path, run_command: Command
) -> None:
    folder = tmp_path / "f"
    (folder / "empty").mkdir(parents=True)
    (folder / "broken.json").write_text(Path(base).read_text()[:300])
    save(folder / "newer.json", section={"schema": VERSION + 1})
    save(folder / "other.json", machine={"name": "b", "threads": 4})
    save(folder / "apart" / "m" / "0001_x.json")
    save(folder / "apart" / "m" / "0002_x.json", section={"cases": [other_benchmark("real")]})
    for machine in ("m", "n"):
        save(folder / "two" / machine / "0001_x.json")
    code, _, complaint = run_command("compare", *(each.format(base=base, folder=folder) for each in arguments))
    assert code == 2
    assert said in complaint
    assert len(complaint.strip().splitlines()) == 1


def test_other_machines_are_compared_by_what_carries_no_noise(base: str, tmp_path: Path, run_command: Command) -> None:
    new = save(tmp_path / "new.json", metrics(slower=3.0), machine={"name": "b"})
    assert "--across-machines" in run_command("compare", base, new)[2]
    code, printed, complaint = run_command("compare", base, new, "--across-machines")
    assert (code, complaint) == (0, "")
    assert "note: machines differ: machine: a-2c-cpu → b" in printed
    assert "step_seconds" not in printed
    worse = save(tmp_path / "worse.json", metrics(trainable_params=3), machine={"name": "b"})
    assert run_command("compare", base, worse, "--across-machines")[0] == 1


def test_one_run_that_is_not_comparable_does_not_hide_the_others(
    base: str, tmp_path: Path, run_command: Command
) -> None:
    runs = [
        save(tmp_path / "2.json", machine={"threads": 4}),
        save(tmp_path / "3.json", metrics(slower=1.2)),
    ]
    out = tmp_path / "out.json"
    code, printed, complaint = run_command("compare", base, *runs, "--json", str(out))
    assert code == 2
    assert "2.json and" in complaint
    assert "NOT COMPARABLE: the machines differ" in printed
    assert "1 worse" in printed
    assert [each["exit_code"] for each in json.loads(out.read_text())["comparisons"]] == [2, 1]


# Outputs


@pytest.fixture
def outputs(base: str, tmp_path: Path, run_command: Command) -> dict[str, str]:
    """The terminal's text, the Markdown and the JSON of one comparison in which everything happens."""
    odd = "a|b`c <d> [e] *f* _g_ \\ &"
    changed = metrics(
        slower=1.0837,
        trainable_params=1_843_201,
        allocated_peak_bytes=1_300_000_017,
        held_out_loss=2.34567891,
        phase_of_peak=odd,
    )
    new = save(tmp_path / "new.json", changed, metrics(slower=0.5), machine={"libraries": {"torch": "2.13"}})
    first = json.loads(Path(base).read_text())
    first["peft_gauge"]["cases"][0]["metrics"] |= {"held_out_loss": 2.0, "phase_of_peak": "backward"}
    Path(base).write_text(json.dumps(first))
    out = tmp_path / "out.json"
    code, terminal, _ = run_command("compare", base, new, "--all", "--json", str(out))
    assert code == 1
    _, markdown, _ = run_command("compare", base, new, "--all", "--markdown")
    return {"terminal": terminal, "markdown": markdown, "json": out.read_text()}


def test_terminal_markdown_and_json_agree(outputs: dict[str, str]) -> None:
    (comparison,) = json.loads(outputs["json"])["comparisons"]
    shown = [list(row["shown"].values()) for row in comparison["rows"]]
    table = [line for line in outputs["markdown"].splitlines() if line.startswith("| ")][2:]
    in_markdown = [[unescaped(part) for part in re.split(r"(?<!\\) ?\| ?", line)[1:-1]] for line in table]
    assert in_markdown == shown
    terminal = spaceless(outputs["terminal"])
    for verdict, case, metric, before, after, change, judged, remark in shown:
        values = f"{before} → {after}" if (before, after) != ("–", "–") else ""
        about = ", ".join(part for part in (values, change) if part not in ("", "–"))
        told = ": ".join(part for part in (metric if metric != "outcome" else "", about) if part)
        told += (f"judged {judged}" if judged != "–" else "") + (remark if remark != "–" else "")
        place = terminal.find(spaceless(f"{verdict}{case}{told}"))
        assert place >= 0, told
        terminal = terminal[place:]  # in the same order
    counts = ", ".join(f"{number} {name}" for name, number in comparison["counts"].items())
    assert counts in outputs["markdown"]
    assert counts in " ".join(outputs["terminal"].partition(" against ")[0].split())


def spaceless(text: str) -> str:
    """``text`` however it was wrapped."""
    return re.sub(r"\s", "", text)


def unescaped(text: str) -> str:
    text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return re.sub(r"\\(.)", r"\1", text)


def test_shown_numbers_are_those_of_the_json(outputs: dict[str, str]) -> None:
    rows = json.loads(outputs["json"])["comparisons"][0]["rows"]
    by_metric = {row["metric"]: row for row in rows if row["test"] == IDS[0]}
    loss, peak, params, step = (
        by_metric[name] for name in ("held_out_loss", "allocated_peak_bytes", "trainable_params", "step_seconds")
    )
    assert (loss["shown"]["before"], loss["shown"]["after"]) == ("2", "2.345679")
    assert loss["shown"]["change"] == "+0.3456789, +17.3 %"
    assert peak["shown"]["change"] == f"+{peak['after'] - peak['before']:,}, {100 * (peak['ratio'] - 1):+.1f} %"
    assert (params["shown"]["after"], params["shown"]["change"]) == ("1,843,201", "+1, +0.0 %")
    judged = step["judged"]
    assert judged["ratio"] == pytest.approx(1.0837)
    percent = [f"{100 * (judged[name] - 1):+.1f} %" for name in ("ratio", "low", "high")]
    assert step["shown"]["judged"] == f"{percent[0]} [{percent[1]}, {percent[2]}] over control"
    assert step["shown"]["before"] == f"{step['before']:.2f} s"
    assert 3.0 < step["before"] < 3.4


def test_the_json_is_as_its_description_says(outputs: dict[str, str]) -> None:
    document = json.loads(outputs["json"])
    assert document.keys() == {"schema", "comparisons"}
    (comparison,) = document["comparisons"]
    assert comparison.keys() == {
        *("base", "new", "environment", "notes", "incomparable", "exit_code", "counts", "rows"),
    }
    assert comparison["environment"] == ["torch: absent → 2.13"]
    assert {frozenset(row) for row in comparison["rows"]} == {
        frozenset(
            {
                *("test", "metric", "verdict", "label", "before", "after", "ratio", "judged", "relative_to", "cause"),
                *("note", "shown"),
            }
        )
    }
    assert {tuple(row["shown"]) for row in comparison["rows"]} == {HEADINGS}
    assert {row["judged"] and tuple(row["judged"]) for row in comparison["rows"]} == {
        None,
        ("verdict", "ratio", "low", "high", "error", "further"),
    }


def test_no_text_of_a_run_becomes_markup(outputs: dict[str, str]) -> None:
    assert "a|b`c <d> [e] *f* _g_ \\ &" in outputs["terminal"]
    assert "a\\|b\\`c &lt;d&gt; \\[e\\] \\*f\\* \\_g\\_ \\\\ &amp;" in outputs["markdown"]


@pytest.fixture
def many(tmp_path: Path) -> tuple[str, str]:
    """Nine cases timed by one process, four that are gone, five new ones that BASE did not ask, and one regression."""

    def document(slower: float, *others: dict[str, Any]) -> dict[str, Any]:
        cases = [
            {
                "id": f"benchmarks/test_speed.py::test_step[method-{number}-toy-cpu]",
                "benchmark": "test_speed",
                "outcome": "passed",
                "reason": None,
                "metrics": {"trainable_params": 7, SAMPLES: {"step_seconds": [[slower * (1 + number / 100)] * 5]}},
            }
            for number in range(9)
        ]
        return {"cases": [*cases, *others]}

    gone = [{**other_benchmark(f"gone[{number}]"), "benchmark": "test_speed"} for number in range(4)]
    come = [other_benchmark(f"come[{number}]") for number in range(5)]
    worse = other_benchmark("worse") | {"benchmark": "test_speed"}
    return (
        save(tmp_path / "1.json", section=document(1.0, *gone, worse)),
        save(tmp_path / "2.json", section=document(1.02, *come, worse | {"outcome": "crashed", "reason": "signal 11"})),
    )


def test_times_that_cannot_be_told_apart_are_one_line(many: tuple[str, str], run_command: Command) -> None:
    code, printed, _ = run_command("compare", *many)
    assert code == 1
    verdicts = [line[:12].strip() for line in printed.splitlines()[2:] if not line.startswith(" ")]
    assert verdicts == ["worse: CRASH", "MISSING", "inconclusive", "NEW"]
    (undecided,) = [line for line in printed.splitlines() if line.startswith("inconclusive")]
    assert lacking(undecided, "9 times of 9 cases, +2.0 % to +2.0 %", "--all") == []
    assert "4 cases: test_verdicts.py (4)" in printed
    assert "5 cases: test_verdicts.py (5)" in printed
    assert "BASE did not run this benchmark" in printed
    assert printed.splitlines()[0] == ("REGRESSION: 1 worse, 9 inconclusive, 0 better, 18 same, 4 MISSING, 5 NEW")
    every = run_command("compare", *many, "--all")[1]
    assert every.count("step_seconds") == 9
    assert every.count("MISSING") == 4 + 1
    table = run_command("compare", *many, "--markdown")[1]
    assert "more processes per side would decide the clearest; --all" in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 2 + 4


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("every", [[], ["--all"]])
def test_it_fits_the_terminal(
    width: int, every: list[str], many: tuple[str, str], run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run_command("compare", *many, *every)[1].splitlines()
    assert max(len(line) for line in lines if " against " not in line) <= width  # paths are not broken


@pytest.mark.parametrize(
    ("row", "heading", "text"),
    [
        (Row("t", "x", "inconclusive", "NEW"), "verdict", "NEW"),
        (Row("t", "x", "worse", "OUT OF MEMORY"), "verdict", "worse: OUT OF MEMORY"),
        (Row("t", "x", "worse"), "verdict", "worse"),
        (Row("benchmarks/a.py::b", "x", "same"), "case", "a.py::b"),
        (Row("t", "x", "same"), "before", "–"),
        (Row("t", "x", "same", before=0, after=0), "before", "0"),
        (Row("t", "x", "worse", before=True, after=False), "after", "false"),
        (Row("t", "x", "worse", before=[1], after=[1, {"a": None}]), "after", '[1, {"a": null}]'),
        (Row("t", "x", "worse", before="a", after="b" * 99), "after", "b" * 47 + "…"),
        (Row("t", "x_seconds", "same", before=0.00123), "before", "1.23 ms"),
        (Row("t", "x", "worse", before=0, after=3), "change", "+3"),
        (Row("t", "x", "worse", before=4, after=3, ratio=0.75), "change", "-1, -25.0 %"),
        (Row("t", "x", "same", before=4, after=4, ratio=1.0), "change", "–"),
        (Row("t", "x", "worse", before=1, after=20, ratio=20.0), "change", "+19, > +999 %"),
        (Row("(all)", "seconds", "inconclusive", "ALL TIMES", ratio=1.2), "change", "+20.0 %"),
        (
            Row("t", "x", "same", judged=Judgement("same", 1.0, 0.99, 1.01, 0.05, None)),
            "judged",
            "+0.0 % [-1.0 %, +1.0 %]",
        ),
        (Row("t", "x", "worse", cause="c", note="n"), HEADINGS[-1], "c; n"),
    ],
)
def test_cells(row: Row, heading: str, text: str) -> None:
    assert dict(zip(HEADINGS, cells(row), strict=True))[heading] == text


def test_output_is_the_same_each_time(base: str, tmp_path: Path, run_command: Command) -> None:
    new = save(tmp_path / "new.json", metrics() | {SAMPLES: {"step_seconds": [[1.0, 2.0, 3.0, 2.5]]}})
    assert run_command("compare", base, new) == run_command("compare", base, new)


def test_comparing_needs_no_heavy_library(base: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom peft_gauge import cli\nsys.argv = ['peft-gauge', 'compare', *sys.argv[1:]]\n"
        "early = {'numpy', 'scipy'} & set(sys.modules)\n"
        "try:\n    cli.main()\nfinally:\n"
        "    print(sorted(early), sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, base, base], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[] []"
