"""The ceilings' file: read what was written, refuse what is broken, say what changed; and the command over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_gauge.commands import ceilings as ceilings_command
from peft_gauge.errors import GaugeError
from peft_gauge.plan import ceilings, worker
from peft_gauge.plan.ceilings import Ceiling, CeilingKey, CeilingTable, Margins
from peft_gauge.plan.planner import plan
from peft_gauge.plan.record import DeviceEstimate, Plan, PlanFailure, PlanRequest
from peft_gauge.training import methods
from peft_gauge.training.cases import Case
from peft_gauge.training.loops import step_settings
from peft_gauge.training.models import resolve
from peft_gauge.training.settings import StepSettings

# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

MIB = 1 << 20
LORA = CeilingKey("toy-llama", "lora", "cuda", "bfloat16", 2, 16)
FULL = replace(LORA, method="full")
VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "accelerate": "1.15.0",
}
TABLE = CeilingTable({LORA: Ceiling(10, 20, 30), FULL: Ceiling(1_000, 2_000, 3_000)}, Margins(), VERSIONS)


def a_plan(**changes: Any) -> Plan:
    device = DeviceEstimate(
        allocated_bytes=110 * MIB,
        reserved_bytes=120 * MIB,
        context_bytes=500 * MIB,
        cublas_workspace_bytes=8 * MIB,
        cublaslt_workspace_bytes=1 * MIB,
        origins={},
    )
    values: dict[str, Any] = {
        "model": "toy-llama", "method": "lora", "settings": {}, "trainable_params": 1, "total_params": 2,
        "phase_of_peak": "backward", "peak_bytes": 100 * MIB, "resident_bytes": 1, "resident_live_outputs_bytes": 1,
        "allocated_bytes_estimate": 110 * MIB, "reserved_bytes_estimate": 120 * MIB,
        "device_bytes_estimate": 620 * MIB, "device": device,
        "peak_by_category": {}, "resident_by_category": {}, "saved_activation_bytes_per_token": 0.0,
        "flops_per_step": 0,
    }  # fmt: skip
    return Plan(**{**values, **changes})


def written(path: Path, table: CeilingTable = TABLE) -> Path:
    ceilings.write(path, table)
    return path


# --- the margins


def test_a_ceiling_is_the_plan_with_its_margins() -> None:
    # Workspaces are 9 MiB in the plan and 65 MiB in a ceiling: 56 MiB more in segments, all 65 over the tensors' peak.
    assert Margins().ceiling(a_plan()) == Ceiling(
        allocated_bytes=103 * MIB + 65 * MIB,
        reserved_bytes=-(-176 * MIB * 112 // 100),
        device_bytes=-(-676 * MIB * 115 // 100),
    )


def test_a_margin_is_rounded_up_and_never_down() -> None:
    margins = Margins(allocated_percent=1, workspace_bytes=9 * MIB)
    assert margins.ceiling(a_plan(peak_bytes=1)).allocated_bytes == 2 + 9 * MIB
    assert margins.ceiling(a_plan(peak_bytes=100)).allocated_bytes == 101 + 9 * MIB


# --- the file


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert ceilings.read(written(tmp_path / "c.toml")) == TABLE


def test_the_text_does_not_depend_on_the_order_of_the_cases(tmp_path: Path) -> None:
    turned = replace(TABLE, ceilings=dict(reversed(list(TABLE.ceilings.items()))))
    assert ceilings.render(turned) == ceilings.render(TABLE)
    lines = [line for line in ceilings.render(TABLE).splitlines() if line.startswith("    {")]
    assert lines == sorted(lines)
    assert len(lines) == 2


def test_a_name_with_quotes_and_control_characters_survives(tmp_path: Path) -> None:
    key = replace(LORA, method='my "own"\\\x7f\n é')
    table = replace(TABLE, ceilings={key: Ceiling(1, 2, 3)})
    assert ceilings.read(written(tmp_path / "c.toml", table)) == table


def test_a_case_is_found_by_everything_that_names_it(tmp_path: Path) -> None:
    path = written(tmp_path / "c.toml")
    assert ceilings.ceiling_for(LORA, path=path) == Ceiling(10, 20, 30)
    others = [replace(LORA, model="toy"), replace(LORA, device="cpu"), replace(LORA, dtype="float32")]
    others += [replace(LORA, batch=16, seq=2), replace(LORA, loop="trainer"), replace(LORA, mixed_precision="bf16")]
    for other in others:
        assert ceilings.ceiling_for(other, path=path) is None


def test_autocast_and_a_trainer_are_cases_of_their_own(tmp_path: Path) -> None:
    under_bf16, by_trainer = replace(LORA, mixed_precision="bf16"), replace(LORA, loop="trainer")
    table = replace(
        TABLE, ceilings={LORA: Ceiling(10, 20, 30), under_bf16: Ceiling(1, 2, 3), by_trainer: Ceiling(4, 5, 6)}
    )
    path = written(tmp_path / "c.toml", table)
    assert ceilings.read(path) == table
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("    {")]
    assert ["loop" in line for line in lines] == [False, False, True]
    assert ["mixed_precision" in line for line in lines] == [True, False, False]
    assert ceilings.shown(replace(by_trainer, mixed_precision="bf16")).endswith("2×16, trainer, bf16")


@pytest.mark.parametrize("loop", ["plain", "trainer"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_case_has_a_key_if_its_other_settings_are_the_defaults(loop: str, precision: str) -> None:
    def case(**asked: Any) -> Case:
        fields = {"batch": 2, "seq": 16, "mixed_precision": precision, **asked}
        settings, further = step_settings(loop, fields, {})
        record = resolve("toy-llama", weights="random")
        return Case(record, methods.LORA, settings, "cuda", "bfloat16", 0, None, loop, further)  # type: ignore[arg-type]

    expected = replace(LORA, loop=loop, mixed_precision=precision)
    assert ceilings.key_of(case()) == expected
    assert ceilings.key_of(case(optimizer="sgd")) is None
    assert ceilings.key_of(replace(case(), attention="eager")) is None
    # A trainer that takes this suite's own settings is a trainer all the same.
    assert ceilings.key_of(replace(case(), settings=StepSettings(2, 16, mixed_precision=precision))) == (  # type: ignore[arg-type]
        expected if loop == "plain" else None
    )


def test_a_written_file_is_read_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "c.toml")
    ceilings.read(path)
    changed = replace(TABLE, ceilings={LORA: Ceiling(11, 21, 31)})
    assert ceilings.read(written(path, changed)) == changed


ROW = ceilings.shown_row(LORA, Ceiling(10, 20, 30))
BROKEN = {
    "no TOML": ("ceilings = [", "ceilings = [["),
    "a field is missing": ("seq = 16, ", ""),
    "a field too many": ("seq = 16", "seq = 16, rank = 8"),
    "a text for a number": ("allocated_bytes = 10", 'allocated_bytes = "10"'),
    "a fraction": ("allocated_bytes = 10", "allocated_bytes = 10.5"),
    "a truth value": ("batch = 2", "batch = true"),
    "zero": ("allocated_bytes = 10", "allocated_bytes = 0"),
    "a number for a name": ('method = "lora"', "method = 7"),
    "reserved under allocated": ("allocated_bytes = 10", "allocated_bytes = 25"),
    "twice": (ROW, f"{ROW},\n    {ROW}"),
    "no margins": ("margins = {", "margin = {"),
    "an unknown margin": ("allocated_percent", "allocated_share"),
    "a library is missing": ("torch = ", "tensorflow = "),
    "ceilings are no list": ("ceilings = [", "other = ["),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_file_is_one_line_that_says_how_to_mend_it(tmp_path: Path, reason: str) -> None:
    path = written(tmp_path / "c.toml")
    text = path.read_text(encoding="utf-8")
    assert BROKEN[reason][0] in text
    path.write_text(text.replace(*BROKEN[reason]), encoding="utf-8")
    with pytest.raises(GaugeError, match="is not a table of ceilings: .*; run: peft-gauge ceilings --write") as caught:
        ceilings.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_no_traceback(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GaugeError, match="is not a table of ceilings"):
        ceilings.read(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "c.toml")
    before = path.read_text(encoding="utf-8")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(GaugeError, match=r"cannot write .*No space left"):
        ceilings.write(path, replace(TABLE, ceilings={LORA: Ceiling(11, 21, 31)}))
    assert path.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [path]


def test_changes_are_the_lines_that_go_and_come() -> None:
    new, gone, same = replace(LORA, seq=17), replace(LORA, seq=18), replace(LORA, seq=19)
    old_table = {LORA: Ceiling(10, 20, 30), gone: Ceiling(1, 2, 3), same: Ceiling(1, 2, 3)}
    new_table = {LORA: Ceiling(11, 20, 30), new: Ceiling(1, 2, 3), same: Ceiling(1, 2, 3)}
    assert ceilings.changes(old_table, new_table) == [
        f"- {ceilings.shown_row(LORA, Ceiling(10, 20, 30))}",
        f"+ {ceilings.shown_row(LORA, Ceiling(11, 20, 30))}",
        f"+ {ceilings.shown_row(new, Ceiling(1, 2, 3))}",
        f"- {ceilings.shown_row(gone, Ceiling(1, 2, 3))}",
    ]


def test_the_projects_own_file_holds_every_case_of_the_suite() -> None:
    table = ceilings.read(ceilings.default_path())
    assert set(table.ceilings) == {
        CeilingKey(model, method.name, "cuda", "bfloat16", batch, seq, loop, precision)
        for model, shapes in ceilings_command.SHAPES.items()
        for loop, precision, asked in [
            ("plain", "no", shapes),
            *((*step, shapes[-1:]) for step in ceilings_command.STEPS),
        ]
        for batch, seq in asked
        for method in methods.DEFAULT_METHODS
    }
    assert table.margins == Margins()
    assert ceilings.default_path().read_text(encoding="utf-8") == ceilings.render(table)


# --- the command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, run_command: Run, tmp_path: Path) -> Run:
    """``run("--write")``: exit code, standard output and error, over two small models and ``c.toml``."""
    monkeypatch.setattr(ceilings_command, "SHAPES", {"toy-llama": ((2, 16),), "smollm2-135m": ((1, 8),)})
    monkeypatch.setattr(ceilings_command, "STEPS", ())

    def command(*arguments: str) -> tuple[int, str, str]:
        return run_command("ceilings", "--file", str(tmp_path / "c.toml"), *arguments)

    return command


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Replaces planning: every plan is `a_plan`, its peak that of the method in this dictionary, if it is there."""
    by_method: dict[str, int] = {}

    def plan_all(requests: Sequence[Any]) -> Iterator[Plan | PlanFailure]:
        for request in requests:
            peak = by_method.get(request.method.name, 100 * MIB)
            yield a_plan(peak_bytes=peak) if peak else PlanFailure("m", request.method.name, "cannot be planned: why")

    monkeypatch.setattr(worker, "plan_all", plan_all)
    return by_method


def test_real_plans_become_ceilings_and_are_the_same_the_next_time(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ceilings_command, "SHAPES", {"toy-llama": ((2, 16),)})
    monkeypatch.setattr(ceilings_command, "STEPS", (("trainer", "bf16"),))
    monkeypatch.setattr(methods, "DEFAULT_METHODS", (methods.LORA, methods.PROMPT))

    def plan_all(requests: Sequence[Any]) -> Iterator[Any]:  # in this process, which has the libraries already
        for request in requests:
            yield from worker._outcome(request, None)

    monkeypatch.setattr(worker, "plan_all", plan_all)
    assert run("--check")[0] == 1
    assert not (tmp_path / "c.toml").exists()
    assert run("--write")[0] == 0
    code, out, _ = run()
    assert (code, out.splitlines()) == (0, [f"{tmp_path / 'c.toml'} is up to date: 4 ceilings"])
    found = ceilings.ceiling_for(LORA, path=tmp_path / "c.toml")
    assert found is not None
    planned = plan(PlanRequest(resolve("toy-llama", weights="random"), methods.LORA, StepSettings(2, 16)))
    assert found == Margins().ceiling(planned)
    of_trainer = ceilings.ceiling_for(replace(LORA, loop="trainer", mixed_precision="bf16"), path=tmp_path / "c.toml")
    settings, further = step_settings("trainer", {"batch": 2, "seq": 16, "mixed_precision": "bf16"}, {})
    request = PlanRequest(
        resolve("toy-llama", weights="random"), methods.LORA, settings, loop="trainer", trainer_arguments=further
    )
    assert of_trainer == Margins().ceiling(plan(request))
    assert of_trainer != found


def test_a_check_shows_case_old_and_new_and_writes_nothing(run: Run, peaks: dict[str, int], tmp_path: Path) -> None:
    run("--write")
    before = (tmp_path / "c.toml").read_text(encoding="utf-8")
    peaks["lora"] = 90 * MIB
    code, out, err = run()
    lines = out.splitlines()
    assert (code, err) == (1, "")
    assert [line[0] for line in lines] == ["-", "+", "-", "+", str(tmp_path)[0]]
    assert all('method = "lora"' in line for line in lines[:4])
    assert f"allocated_bytes = {103 * MIB + 65 * MIB:_}" in lines[0]
    assert f"allocated_bytes = {-(-90 * MIB * 103 // 100) + 65 * MIB:_}" in lines[1]
    assert (tmp_path / "c.toml").read_text(encoding="utf-8") == before


def test_one_model_is_written_and_the_other_kept(run: Run, peaks: dict[str, int], tmp_path: Path) -> None:
    run("--write")
    peaks["lora"] = 90 * MIB
    assert run("--write", "--model", "toy-llama")[0] == 0
    assert run("--model", "toy-llama")[0] == 0
    assert run("--model", "smollm2-135m")[0] == 1
    assert len(ceilings.read(tmp_path / "c.toml").ceilings) == 14


@pytest.mark.parametrize("difference", ["versions", "margins"])
def test_a_table_is_of_one_planning(
    run: Run, peaks: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, difference: str
) -> None:
    run("--write")
    before = ceilings.read(tmp_path / "c.toml")
    changed = {"versions": {**before.versions, "peft": "0.0.1"}} if difference == "versions" else {
        "margins": Margins(device_percent=99)
    }  # fmt: skip
    ceilings.write(tmp_path / "c.toml", replace(before, **changed))
    code, _, err = run("--write", "--model", "toy-llama")
    assert code == 2
    assert err.startswith("peft-gauge: ")
    assert "leave out --model" in err
    code, out, _ = run()
    # Other versions with the same metrics are no reason to fail; other margins are.
    assert (code, "peft was 0.0.1" in out) == ((0, True) if difference == "versions" else (1, False))
    assert ("the margins were" in out) == (difference == "margins")


def test_a_case_that_cannot_be_planned_writes_nothing(run: Run, peaks: dict[str, int], tmp_path: Path) -> None:
    peaks["ia3"] = 0
    assert run("--write") == (2, "", "peft-gauge: cannot be planned: why\n")
    assert not (tmp_path / "c.toml").exists()


def test_a_broken_file_stops_a_check_and_is_replaced_by_a_write(
    run: Run, peaks: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text("<<<<<<< ours\n", encoding="utf-8")
    for arguments in ((), ("--write", "--model", "toy-llama")):
        code, _, err = run(*arguments)
        assert (code, err.count("\n")) == (2, 1)
    assert run("--write")[0] == 0
    assert run()[0] == 0


def test_a_model_without_ceilings_is_refused_with_the_nearest(run: Run, peaks: dict[str, int]) -> None:
    code, out, err = run("--model", "toy-lama")
    assert (code, out) == (2, "")
    assert "did you mean toy-llama" in err
