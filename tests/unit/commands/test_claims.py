"""The table of claims, from planted runs: which verdict counts, what is marked, and whether a file that holds it is
current. README's own is among them."""

from __future__ import annotations

import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.claims import NOT_MEASURED, ledger
from peft_gauge.commands.claims import END, HEADINGS, START, as_markdown
from peft_gauge.history.ledger import NewestVerdicts, Standing
from peft_gauge.history.reader import read_run, runs_in
from tests.support import report_runs
from tests.support.paths import ROOT
from tests.support.report_runs import CARD, save

Command = Callable[..., tuple[int, str, str]]

ROWS = sum(len(one.models) for one in ledger().values())
PAGE = f"# Title\n\nThe line {START} begins it.\n\n{START}\nold\n{END}\n\nThe end, without a newline"


def claim(verdict: str, id_: str = "lora-memory", model: str = "llama-2-7b", **changes: Any) -> dict[str, Any]:
    """A claim of the ledger, in its words, as a run saves it; one that is not measured has no metric."""
    found = report_runs.claim(verdict, id_, model) | {"statement": ledger()[id_].statement}
    if verdict == NOT_MEASURED:
        found |= {"metric": None, "conditions": None}
    return found | changes


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A slow run, a bare one after it that decides less, and the newest one, on another machine.

    "lora-memory" is recorded as refuted, "many-adapters" as holding; "qlora-quality" is asked and never decided.
    """
    folder = tmp_path / "results"
    adapters = ("many-adapters", "smollm2-135m")
    undecided = claim(NOT_MEASURED, "qlora-quality", "smollm2-135m")
    save(folder, 1, [], [claim("holds"), claim("holds", *adapters, metric="7 MB | [b] <b>"), undecided])
    save(folder, 2, [], [claim("refuted", metric="16 GB"), claim(NOT_MEASURED, *adapters), undecided])
    save(folder, 3, [], [claim("inconclusive", metric="17 GB"), claim("holds", "identity", "any")], machine=CARD)
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def standings_of(paths: list[Path]) -> dict[tuple[str, str], Standing]:
    newest = NewestVerdicts()
    for path in paths:
        newest.add(read_run(path))
    return {(one.id, one.model): one for one in newest.of_ledger(ledger())}


# Which verdict counts


def test_every_claim_has_a_row_for_every_model_in_the_ledgers_order(results: Path) -> None:
    found = standings_of(runs_in(results))
    assert list(found) == [(one.id, model) for one in ledger().values() for model in one.models]
    assert [one.statement for one in found.values()] == [ledger()[id_].statement for id_, _ in found]


def test_the_newest_run_that_decided_a_claim_counts(results: Path) -> None:
    found = standings_of(runs_in(results))
    adapters, memory = found["many-adapters", "smollm2-135m"], found["lora-memory", "llama-2-7b"]
    assert adapters.source is not None
    assert memory.source is not None
    assert (adapters.verdict, adapters.source.run, adapters.source.machine) == ("holds", "0001", "cpu-box")
    assert f"{adapters.source.ended:%Y-%m-%d}" == "2026-02-01"
    assert (memory.verdict, memory.metric, memory.source.machine) == ("inconclusive", "17 GB", "GPU-box")
    assert (memory.source.commit, memory.source.libraries["torch"]) == ("000000000000", "2.13.0")


def test_what_no_run_decided_is_not_measured_yet(results: Path) -> None:
    found = standings_of(runs_in(results))
    for key in (("qlora-quality", "smollm2-135m"), ("rank-tradeoff", "smollm2-135m")):  # asked, and never asked
        one = found[key]
        assert (one.verdict, one.metric, one.conditions, one.source) == (NOT_MEASURED, None, None, None)
        assert not one.differs
        assert not one.reworded


def test_the_order_in_which_runs_are_given_does_not_matter(results: Path) -> None:
    paths = runs_in(results)
    expected = standings_of(paths)
    for seed in range(6):
        random.Random(seed).shuffle(paths)
        assert standings_of(paths) == expected


def test_a_decision_counts_beside_a_skip_in_the_same_run(tmp_path: Path) -> None:
    """`test_claims.py` skips what a slow benchmark decides, and one run can hold both."""
    for day, order in enumerate((("holds", NOT_MEASURED), (NOT_MEASURED, "holds"))):
        path = save(tmp_path, day, [], [claim(verdict) for verdict in order])
        assert standings_of([path])["lora-memory", "llama-2-7b"].verdict == "holds"


def test_a_time_zone_changes_neither_order_nor_date(tmp_path: Path) -> None:
    earlier, later = (save(tmp_path, day, [], [claim(verdict)]) for day, verdict in ((1, "holds"), (2, "refuted")))
    # Half past eight in the evening in UTC, which the other's noon on the next day is after.
    earlier.write_text(earlier.read_text().replace("2026-02-01T12:00:00+00:00", "2026-02-02T12:30:00+16:00"))
    later.write_text(later.read_text().replace("2026-02-02T12:00:00+00:00", "2026-02-02T00:00:00-12:00"))
    assert standings_of([later, earlier])["lora-memory", "llama-2-7b"].verdict == "refuted"
    source = standings_of([earlier])["lora-memory", "llama-2-7b"].source
    assert source is not None
    assert f"{source.ended:%Y-%m-%d %H:%M}" == "2026-02-01 20:30"


@pytest.mark.parametrize("recorded", ["holds", "refuted", "inconclusive", NOT_MEASURED])
@pytest.mark.parametrize("measured", ["holds", "refuted", "inconclusive", NOT_MEASURED])
def test_a_verdict_other_than_the_recorded_one_is_marked(measured: str, recorded: str, tmp_path: Path) -> None:
    newest = NewestVerdicts()
    newest.add(read_run(save(tmp_path, 1, [], [claim(measured)])))
    asked = replace(ledger()["lora-memory"], recorded={"llama-2-7b": recorded})
    (found,) = newest.of_ledger({asked.id: asked})
    assert found.differs == (measured not in (recorded, NOT_MEASURED))
    assert any(f"{measured} (recorded: {recorded})" in line for line in as_markdown([found])) == found.differs


def test_a_decision_on_other_words_is_marked(tmp_path: Path) -> None:
    found = standings_of(
        [save(tmp_path, 1, [], [claim("refuted", statement="LoRA needs 15 GB."), claim("holds", "identity", "any")])]
    )
    assert [key for key, one in found.items() if one.reworded] == [("lora-memory", "llama-2-7b")]
    assert any("| refuted (of an earlier wording) |" in line for line in as_markdown(list(found.values())))


# The tables


def test_markdown_has_a_row_for_each_with_what_is_shared_left_empty(results: Path, run_command: Command) -> None:
    code, printed, complaint = run_command("claims", str(results), "--markdown")
    assert (code, complaint) == (0, "")
    lines = printed.splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert {len(row) for row in rows} == {len(HEADINGS)}
    assert len(rows) == 2 + ROWS
    assert len([row for row in rows if row[0].startswith(" **")]) == len(ledger())
    assert lines[0] == (
        f"{len(ledger())} claims, each on one or more models: {ROWS - 3} not measured yet, 2 holds, 1 inconclusive; "
        "differing from the recorded verdict: 1. An empty cell repeats the one above."
    )
    memory = ledger()["lora-memory"].statement
    verdict = "inconclusive (recorded: refuted)"
    assert (
        f"| **lora-memory**: {memory} | llama-2-7b | {verdict} | 17 GB | 1×64 tokens | 2026-02-03 | GPU-box |" in lines
    )
    assert any(line.endswith(" | 7 MB \\| \\[b\\] &lt;b&gt; | 1×64 tokens | 2026-02-01 | cpu-box |") for line in lines)
    assert lines[-2:] == [
        "- 2026-02-03 on GPU-box: run 0001, commit 000000000000, torch 2.13.0, peft 0.21.2",
        "- 2026-02-01 on cpu-box: run 0001, commit 000000000000, torch 2.13.0, peft 0.21.2",
    ]


def test_an_empty_cell_is_as_above_in_the_same_claim(tmp_path: Path) -> None:
    sizes = ("tinyllama", "llama-2-7b", "llama-2-13b", "llama-2-70b")
    asked = [claim("holds", "lora-ratio", model, conditions="b" if model == sizes[2] else "a") for model in sizes]
    other = claim("holds", "qlora-ratio", "tinyllama", conditions="a")
    found = standings_of([save(tmp_path, 1, [], [*asked, other])])
    shown = as_markdown([one for key, one in found.items() if key[0].endswith("lora-ratio")])
    cells = [line.strip("|").split("|") for line in shown if line.startswith("| ") and "1.23 GB" in line]
    first, again, differs, back, next_claim = [[*map(str.strip, row)] for row in cells]
    assert first[4:] == ["a", "2026-02-01", "cpu-box"]
    assert (again[0], again[4:]) == ("", ["", "", ""])
    assert (differs[0], differs[4:]) == ("", ["b", "", ""])
    assert (back[0], back[4:]) == ("", ["a", "", ""])
    assert next_claim[0].startswith("**qlora-ratio**")
    assert next_claim[4:] == first[4:]


def test_the_terminal_shows_verdicts_figures_dates_and_machines(results: Path, run_command: Command) -> None:
    code, printed, complaint = run_command("claims", str(results))
    assert (code, complaint) == (0, "")
    assert re.search(r"many-adapters +│ smollm2-135m +│ holds +│ 7 MB \| \[b\] <b> +│ 2026-02-01 │ cpu-box", printed)
    assert re.search(r"rank-tradeoff +│ smollm2-135m +│ not measured yet +│ – +│ – +│ –", printed)
    assert re.search(r"lora-memory +│ llama-2-7b +│ inconclusive \(recorded: refuted\) +│ 17 GB", printed)
    assert "differing from the recorded verdict: 1" in " ".join(printed.split())


# A file that holds the table


def test_what_was_written_is_current_and_the_rest_of_the_file_stays(
    results: Path, page: Path, run_command: Command
) -> None:
    assert run_command("claims", str(results), "--write", str(page)) == (0, f"wrote {page}\n", "")
    written = page.read_text()
    markdown = run_command("claims", str(results), "--markdown")[1]
    assert written == PAGE.replace("old\n", f"\n{markdown}\n")
    assert run_command("claims", str(results), "--check", str(page)) == (
        0,
        f"{page} is up to date: {ROWS} verdicts\n",
        "",
    )
    run_command("claims", str(results), "--write", str(page))
    assert page.read_text() == written


def test_a_stale_file_is_one_line_that_says_what_differs_and_what_to_run(
    results: Path, page: Path, run_command: Command
) -> None:
    run_command("claims", str(results), "--write", str(page))
    before = page.read_text()
    save(results, 9, [], [claim("refuted"), claim("refuted", "identity", "any")])
    code, printed, complaint = run_command("claims", str(results), "--check", str(page))
    assert (code, complaint, printed.count("\n")) == (1, "", 1)
    assert printed.startswith(f"{page} is out of date: identity on any, lora-memory on llama-2-7b differ; ")
    assert page.read_text() == before
    name, *arguments = shlex.split(printed.partition("run: ")[2])
    assert name == "peft-gauge"
    assert run_command(*arguments)[0] == 0
    assert run_command("claims", str(results), "--check", str(page))[0] == 0


def test_many_changes_are_counted(results: Path, page: Path, run_command: Command) -> None:
    printed = run_command("claims", str(results), "--check", str(page))[1]
    first = [f"{one.id} on {model}" for one in ledger().values() for model in one.models][:3]
    assert f"{', '.join(first)}, {ROWS - 3} more differ; " in printed


@pytest.mark.parametrize("change", ["a row too many", "a row too few", "a verdict", "the words around it"])
def test_every_change_by_hand_is_seen(change: str, results: Path, page: Path, run_command: Command) -> None:
    run_command("claims", str(results), "--write", str(page))
    text = page.read_text()
    row = next(line for line in text.splitlines() if "**identity**" in line)
    changed, said = {
        "a row too many": (text.replace(row, f"{row}\n{row}"), "lines outside the claims' rows differ"),
        "a row too few": (text.replace(f"{row}\n", ""), "identity on any differs"),
        "a verdict": (text.replace(row, row.replace("holds", "refuted")), "identity on any differs"),
        "the words around it": (
            text.replace(" claims, each on", " claims on"),
            "lines outside the claims' rows differ",
        ),
    }[change]
    assert changed != text
    page.write_text(changed)
    code, printed, _ = run_command("claims", str(results), "--check", str(page))
    assert code == 1
    assert said in printed


def test_a_link_to_the_file_stays_a_link(results: Path, page: Path, tmp_path: Path, run_command: Command) -> None:
    link = tmp_path / "link.md"
    link.symlink_to(page)
    assert run_command("claims", str(results), "--write", str(link))[0] == 0
    assert link.is_symlink()
    assert "**lora-memory**" in page.read_text()


def test_the_page_of_claims_is_current(run_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the runs that belong to the project: one that was saved here and is not added to it changes nothing."""
    monkeypatch.chdir(ROOT)
    code, printed, complaint = run_command("claims", *own_runs(), "--check", "docs/claims.md")
    assert (code, complaint) == (0, ""), printed or complaint


def own_runs() -> list[str]:
    """The saved runs that git knows; where it knows none, as in an unpacked archive, all of them."""
    git = shutil.which("git")
    if git is None:
        return ["results"]
    listed = subprocess.run([git, "ls-files", "-z", "results"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [name for name in listed.stdout.split("\0") if name.endswith(".json")] or ["results"]


# Bad input


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        ("folder", "Is a directory"),
        (b"\xff\xfe", "is not valid UTF-8"),
        ("", "must contain the line"),
        (PAGE.replace(START, ""), "must contain the line"),
        (PAGE.replace(END, ""), "must contain the line"),
        (PAGE + f"\n{START}", "must contain the line"),
        (f"{END}\n{START}\n", "must contain the line"),
        (f"said in passing: {START} {END}", "must contain the line"),
    ],
    ids=["missing", "folder", "binary", "empty", "no start", "no end", "two starts", "end first", "in passing"],
)
@pytest.mark.parametrize("option", ["--check", "--write"])
def test_a_file_that_cannot_hold_the_table_is_one_line(
    option: str, content: str | bytes | None, said: str, results: Path, tmp_path: Path, run_command: Command
) -> None:
    file = tmp_path / "x.md"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = file.read_bytes() if file.is_file() else None
    code, printed, complaint = run_command("claims", str(results), option, str(file))
    assert (code, printed, complaint.count("\n")) == (2, "", 1)
    assert str(file) in complaint
    assert said in complaint
    assert (file.read_bytes() if file.is_file() else None) == before


def test_a_file_that_cannot_be_written_is_one_line(
    results: Path, page: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_gauge.history.writer.os.fsync", full)
    code, printed, complaint = run_command("claims", str(results), "--write", str(page))
    assert (code, printed, complaint) == (2, "", f"peft-gauge: cannot write {page}: No space left on device\n")
    assert page.read_text() == PAGE


@pytest.mark.parametrize("kind", ["missing", "empty", "broken", "other"])
def test_where_no_run_is_left_one_line_says_why(kind: str, tmp_path: Path, page: Path, run_command: Command) -> None:
    folder = tmp_path / "runs"
    if kind != "missing":
        folder.mkdir()
    if kind in ("broken", "other"):
        (folder / "0001_x.json").write_text("{" if kind == "broken" else "[]")
    for option in ([], ["--markdown"], ["--check", str(page)], ["--write", str(page)]):
        code, printed, complaint = run_command("claims", str(folder), *option)
        assert (code, printed, complaint.count("\n")) == (2, "", 1)
        assert str(folder) in complaint
    assert page.read_text() == PAGE


def test_the_default_is_the_folder_results(
    results: Path, page: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(results.parent)
    assert run_command("claims")[1] == run_command("claims", str(results))[1]
    assert run_command("claims", "--check", "page.md")[1].endswith("run: peft-gauge claims --write page.md\n")


def test_a_run_that_cannot_be_read_is_named_and_passed_over(results: Path, run_command: Command) -> None:
    expected = run_command("claims", str(results), "--markdown")[1]
    broken = results / "cpu-box" / "0009_broken.json"
    broken.write_text('{"benchmarks": [')
    code, printed, complaint = run_command("claims", str(results), "--markdown")
    assert (code, printed) == (0, expected)
    (line,) = complaint.splitlines()
    assert line.startswith(f"peft-gauge: left out: {broken} is truncated")


@pytest.mark.parametrize(
    "options", [["--markdown", "--check", "x"], ["--check", "x", "--write", "x"], ["--write", "x", "--markdown"]]
)
def test_one_thing_at_a_time(options: list[str], results: Path, run_command: Command) -> None:
    code, printed, complaint = run_command("claims", str(results), *options)
    assert (code, printed) == (2, "")
    assert complaint == "peft-gauge: --json, --csv, --markdown, --check and --write exclude each other; give one\n"
