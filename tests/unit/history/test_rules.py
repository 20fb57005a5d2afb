"""The rules by which metrics of two runs are judged: which applies, and what a mistake in the file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.history.comparison import judge_value
from peft_gauge.history.rules import HostSpread, Rule, read_rules

STEP = "benchmarks/test_speed.py::test_step[lora-smollm2-135m-cpu]"
QUANTIZATION = "benchmarks/test_quantization.py::test_error_on_drawn_weights[normal-nf4]"
HEAD = "family_error = 0.05\nhost_spread = { seconds = 1.6, over_control = 1.4 }\n"
LAST = '{ metric = "*", kind = "exact" }'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("test", "metric", "kind", "direction"),
    [
        (STEP, "step_seconds", "time", "lower"),
        (STEP, "seconds", "time", "lower"),
        (STEP, "control_seconds", "ignore", "none"),
        (STEP, "step_over_control", "ignore", "none"),
        (STEP, "tokens_per_second", "ignore", "none"),
        (STEP, "plan.seconds", "ignore", "none"),
        (STEP, "fingerprint", "exact", "none"),
        (STEP, "trainable_params", "exact", "none"),
        (STEP, "plan.trainable_params", "exact", "none"),
        (STEP, "plan.flops_per_step", "exact", "lower"),
        (STEP, "allocated_peak_bytes", "number", "lower"),
        (STEP, "planned_peak_bytes", "number", "lower"),
        (STEP, "plan.peak_bytes", "number", "lower"),
        (STEP, "plan.resident_bytes", "number", "lower"),
        (STEP, "plan.reserved_bytes_estimate", "number", "lower"),
        (STEP, "plan.peak_by_category.activations", "ignore", "none"),
        (STEP, "plan.device.reserved_bytes", "ignore", "none"),
        (STEP, "saved_activation_bytes_per_token", "number", "lower"),
        (STEP, "held_out_loss", "number", "lower"),
        (STEP, "rss_peak_bytes", "number", "lower"),
        (STEP, "shapes.0.tensor_peak_bytes", "number", "lower"),
        (STEP, "phases.load.cuda allocator.allocated_peak_bytes", "number", "lower"),
        (STEP, "phases.load.cuda allocator.reserved_peak_bytes", "ignore", "none"),
        (STEP, "process_seconds", "ignore", "none"),
        (STEP, "host_step_seconds", "ignore", "none"),
        (STEP, "weights_read_per_second_bytes", "ignore", "none"),
        (STEP, "ranks_tokens_per_second", "ignore", "none"),
        (STEP, "rank_peak_bytes", "number", "lower"),
        (STEP, "rank_sent_bytes", "exact", "lower"),
        (STEP, "rank_step_seconds", "time", "lower"),
        (STEP, "rank_communication_seconds", "ignore", "none"),
        (STEP, "something_new", "ignore", "none"),
        (QUANTIZATION, "relative_rms", "number", "lower"),
        (QUANTIZATION, "p_value", "ignore", "none"),
        ("claim::lora-ratio[tinyllama]", "verdict", "exact", "none"),
    ],
)
def test_the_project_s_rules(test: str, metric: str, kind: str, direction: str) -> None:
    rule = read_rules().of(test, metric)
    assert (rule.kind, rule.direction) == (kind, direction)


@pytest.mark.parametrize("metric", ["step_seconds", "rss_peak_bytes", "reserved_peak_bytes", "device_peak_bytes"])
def test_what_depends_on_the_machine_s_state_is_not_free_of_noise(metric: str) -> None:
    assert not read_rules().of(STEP, metric).noise_free


@pytest.mark.parametrize("metric", ["trainable_params", "allocated_peak_bytes", "planned_peak_bytes", "fingerprint"])
def test_what_does_not_is(metric: str) -> None:
    assert read_rules().of(STEP, metric).noise_free


def test_only_what_no_rule_knows_is_passed_over() -> None:
    rules = read_rules()
    assert rules.passes_over(STEP, "something_new")
    assert not rules.passes_over(STEP, "title")
    assert not rules.passes_over(STEP, "step_seconds")


def test_the_first_match_decides(tmp_path: Path) -> None:
    rules = read_rules(
        written(
            tmp_path,
            f'{HEAD}rules = [{{ test = "*step*", metric = "a*", kind = "ignore" }},\n'
            f'{{ metric = "ab", kind = "number", absolute = 2, relative = 0.1, direction = "higher" }}, {LAST}]',
        )
    )
    assert rules.of("x::test_step", "ab").kind == "ignore"
    assert rules.of("x::test_forward", "ab") == Rule("ab", "number", absolute=2.0, relative=0.1, direction="higher")
    assert rules.of("x::test_forward", "Ab").kind == "exact"
    assert (rules.family_error, rules.host_spread) == (0.05, HostSpread(1.6, 1.4))


@pytest.mark.parametrize(
    ("rule", "before", "after", "verdict"),
    [
        (Rule("*", "exact"), 5, 5, "same"),
        (Rule("*", "exact"), 5, 6, "worse"),
        (Rule("*", "exact"), 5, 4, "worse"),
        (Rule("*", "exact", direction="lower"), 5, 4, "better"),
        (Rule("*", "exact", direction="lower"), 5, 6, "worse"),
        (Rule("*", "exact", direction="higher"), 5, 6, "better"),
        (Rule("*", "exact", direction="higher"), 5, 4, "worse"),
        (Rule("*", "exact", direction="lower"), True, False, "worse"),
        (Rule("*", "exact"), "optimizer", "backward", "worse"),
        (Rule("*", "exact"), [1, 2], [1, 2], "same"),
        (Rule("*", "number", direction="lower"), "text", 4, "worse"),
        (Rule("*", "number", absolute=512, direction="lower"), 10_000, 10_512, "same"),
        (Rule("*", "number", absolute=512, direction="lower"), 10_000, 10_513, "worse"),
        (Rule("*", "number", absolute=512, direction="lower"), 10_000, 9_487, "better"),
        (Rule("*", "number", absolute=512, relative=0.1), 10_000, 11_000, "same"),
        (Rule("*", "number", absolute=512, relative=0.1), 10_000, 8_999, "worse"),
        (Rule("*", "number", relative=0.1), -10, -11, "same"),
        (Rule("*", "number", relative=0.1), -10, -11.1, "worse"),
    ],
)
def test_values_are_judged_by_hand(rule: Rule, before: object, after: object, verdict: str) -> None:
    assert judge_value(rule, before, after) == verdict


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rules = [", "is not TOML"),
        ("rules = []", "family_error, host_spread is missing"),
        (f"{HEAD}rules = []", "the last rule must match everything else"),
        (f'{HEAD}rules = [{{ metric = "a", kind = "exact" }}]', "the last rule must match everything else"),
        (f'{HEAD}rules = [{{ test = "a", metric = "*", kind = "exact" }}]', "the last rule must match"),
        (f"{HEAD}rules = 3", "rules must be a list of tables"),
        (f"{HEAD}rules = [3]", "rules must be a list of tables"),
        (f"{HEAD}rule = []\nrules = [{LAST}]", "unknown key 'rule'; did you mean rules"),
        (
            f'{HEAD}rules = [{{ metric = "a", kynd = "exact" }}, {LAST}]',
            "unknown key in rule 1 'kynd'; did you mean kind",
        ),
        (f'{HEAD}rules = [{LAST}, {{ kind = "exact" }}]', "rule 2 lacks metric"),
        (f'{HEAD}rules = [{{ metric = "a" }}, {LAST}]', "rule 1 lacks kind"),
        (f'{HEAD}rules = [{{ metric = "a", kind = "exakt" }}, {LAST}]', "unknown kind in rule 1 'exakt'; did you mean"),
        (f'{HEAD}rules = [{{ metric = 1, kind = "exact" }}, {LAST}]', "rule 1: metric must be a string, not 1"),
        (
            f'{HEAD}rules = [{{ metric = "a", kind = "exact", direction = "up" }}, {LAST}]',
            "unknown direction in rule 1 'up'",
        ),
        (
            f'{HEAD}rules = [{{ metric = "a", kind = "exact", absolute = 1 }}, {LAST}]',
            "rule 1: absolute is for the kind number, not exact",
        ),
        (
            f'{HEAD}rules = [{{ metric = "a", kind = "number", relative = true }}, {LAST}]',
            "rule 1: relative must be a number of at least 0, not True",
        ),
        (
            f'{HEAD}rules = [{{ metric = "a", kind = "number", absolute = -1 }}, {LAST}]',
            "rule 1: absolute must be a number of at least 0, not -1",
        ),
        (
            f'{HEAD}rules = [{{ metric = "a", kind = "time", minimum_effect = nan }}, {LAST}]',
            "rule 1: minimum_effect must be a number of at least 0, not nan",
        ),
        (
            f'{HEAD}rules = [{{ metric = "a", kind = "time", direction = "higher" }}, {LAST}]',
            "a time has noise and is better when lower",
        ),
        (
            f'{HEAD}rules = [{{ metric = "a", kind = "exact", noise_free = 1 }}, {LAST}]',
            "noise_free must be true or false",
        ),
        (HEAD.replace("0.05", "1") + f"rules = [{LAST}]", "family_error must lie between 0 and 1, not 1"),
        (HEAD.replace("0.05", '"x"') + f"rules = [{LAST}]", "family_error must be a number"),
        (HEAD.replace("1.6", "0.6") + f"rules = [{LAST}]", "factors in host_spread must be at least 1"),
        (HEAD.replace("seconds", "second") + f"rules = [{LAST}]", "host_spread must have the keys"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(GaugeError) as caught:
        read_rules(written(tmp_path, text))
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "rules.toml"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="the rules in .*none.toml cannot be read: No such file"):
        read_rules(tmp_path / "none.toml")


def test_no_rule_goes_by_the_name_of_a_benchmark() -> None:
    """A file or a test may be renamed; only claims, whose ids are their own, have rules by test."""
    assert {rule.test for rule in read_rules().rules} == {"*", "claim::*"}
