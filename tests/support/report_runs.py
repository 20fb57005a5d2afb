"""Saved runs with known metrics, for the tests of the report: two machines, two methods, and what changed when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES, CaseRecord, as_json
from peft_gauge.history.writer import write_run

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
SETTINGS = {"batch": 1, "seq": 64, "dtype": "float32", "weights": "random"}
CONTROL = [[1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 1.03, 0.97, 1.0, 1.0] for _ in range(5)]
CATEGORIES = {"base_weights": 1_000_000_000, "adapter_weights": 20_480, "activations": 234_567_890}
PEAK = sum(CATEGORIES.values())
CPU = {"name": "cpu-box", "accelerator": {"name": None, "memory_bytes": None}, "threads": 2}
CARD = {
    "name": "GPU-box",
    "accelerator": {"name": "NVIDIA H100", "memory_bytes": 85_000_000_000, "driver": "570.1", "cuda": "12.8"},
    "threads": 8,
}


def subject(method: str, model: str, device: str = "cpu") -> dict[str, Any]:
    return {"method": method, "model": model, "device": device, "settings": dict(SETTINGS)}


def memory_case(method: str, model: str, *, extra: int = 0, **metrics: Any) -> CaseRecord:
    """A measured peak of `PEAK` bytes and ``extra`` activations, planned at 1.2 GB."""
    peak = PEAK + extra
    return CaseRecord(
        f"benchmarks/test_memory.py::test_peak[{method}-{model}-cpu]",
        "test_memory",
        "passed",
        metrics={
            **subject(method, model),
            "tensor_peak_bytes": peak,
            "peak_by_category": CATEGORIES | {"activations": CATEGORIES["activations"] + extra},
            "planned_peak_bytes": 1_200_000_000,
            "relative_error": {"tensor_peak_bytes": peak / 1_200_000_000 - 1},
            "phase_of_peak": "backward",
            "shapes": [{"batch": 1, "seq": seq, "tensor_peak_bytes": peak * seq // 64} for seq in (64, 128)],
            "growth": [{"along": "seq", "held": 1, "slope_bytes": 4096.5, "planned_slope_bytes": 4000.0}],
            "growth_of": "tensor_peak_bytes",
            "ceiling": None,
            **metrics,
        },
    )


def step_case(method: str, model: str, *, ratio: float = 3.0, processes: int = 5) -> CaseRecord:
    """A step that takes ``ratio`` times its control, which takes about a second, but for a thousandth."""
    control = CONTROL[:processes]
    rounds = [[ratio * one * (1 + 0.001 * place) for one in each] for place, each in enumerate(control)]
    return CaseRecord(
        f"benchmarks/test_speed.py::test_step[{method}-{model}-cpu]",
        "test_speed",
        "passed",
        metrics={
            **subject(method, model),
            "step_seconds": ratio,
            "step_over_control": ratio,
            SAMPLES: {"step_seconds": rounds},
            CONTROL_SAMPLES: {"step_seconds": control},
            "unsteady": [],
        },
    )


def claim(verdict: str, id_: str = "lora-memory", model: str = "toy") -> dict[str, Any]:
    return {
        "id": id_,
        "model": model,
        "statement": "LoRA needs < 2 GB & no more.",
        "verdict": verdict,
        "metric": "1.23 GB",
        "conditions": "1×64 tokens",
    }


def save(
    results: Path,
    number: int,
    cases: list[CaseRecord],
    claims: list[dict[str, Any]] | None = None,
    *,
    machine: dict[str, Any] = CPU,
    torch: str = "2.13.0",
) -> Path:
    """The run of day ``number``."""
    when = START + timedelta(days=number)
    info = {"python_version": "3.11.7", "cpu": {"brand_raw": "AMD EPYC", "count": 2}, **machine}
    return write_run(
        results,
        info["name"],
        {
            "machine_info": info | {"libraries": {"torch": torch, "peft": "0.21.2", "bitsandbytes": None}},
            "commit_info": {"id": f"{number:040d}", "dirty": False},
            "benchmarks": [],
            "datetime": when.isoformat(),
            "version": "5.0.0",
            "peft_gauge": as_json(cases, claims or [], {}),
        },
        now=when,
    )


def three_runs(results: Path) -> list[Path]:
    """LoRA's peak grows by 5.12 MB in the second run, with a new torch; its step halves in the third.

    In the third run full fine-tuning runs out of memory, another case is skipped, and a claim is refuted.
    """
    full = [memory_case("full", "toy", extra=3_000_000_000), step_case("full", "toy", ratio=9.0)]
    bigger = memory_case("lora", "toy", extra=5_120_000)
    broken = CaseRecord(full[0].id, "test_memory", "out-of-memory", "the GPU's 24 GB were full", subject("full", "toy"))
    skipped = CaseRecord("benchmarks/test_memory.py::test_peak[qlora-toy-cpu]", "test_memory", "skipped", "no <CUDA>")
    return [
        save(results, 1, [memory_case("lora", "toy"), step_case("lora", "toy"), *full], [claim("holds")]),
        save(results, 2, [bigger, step_case("lora", "toy"), *full], [claim("holds")], torch="2.14.0"),
        save(
            results,
            3,
            [bigger, step_case("lora", "toy", ratio=1.5), broken, full[1], skipped],
            [claim("refuted"), claim("inconclusive", "other", "any")],
            torch="2.14.0",
        ),
    ]


def card_run(results: Path) -> Path:
    """One run with CUDA's meters, a ceiling, a planned step and a sweep."""
    of_card: dict[str, Any] = {
        "device": "cuda",
        "allocated_peak_bytes": 2_000_000_000,
        "reserved_peak_bytes": 2_500_000_000,
        "planned_reserved_bytes": 2_400_000_000,
        "ceiling": {"allocated_peak_bytes": 1_900_000_000, "reserved_peak_bytes": 3_000_000_000},
        "relative_error": {"allocated_peak_bytes": 2 / 1.2 - 1, "reserved_peak_bytes": 2.5 / 2.4 - 1},
        "shapes": [{"batch": 1, "seq": seq, "allocated_peak_bytes": 2_000_000_000 + seq} for seq in (64, 128)],
    }
    plan = {
        "method": "qlora",
        "model": "big",
        "settings": dict(SETTINGS),
        "peak_bytes": 5_000_000_000,
        "resident_bytes": 4_000_000_000,
        "peak_by_category": {"base_weights": 4_000_000_000, "dequantized_temporaries": 1_000_000_000},
        "phase_of_peak": "backward",
    }
    sweep = [
        {"label": "r=4", "step_seconds": 1.0, "quality": 0.5},
        {"label": "r=16", "step_seconds": 2.0, "quality": 0.75, "quality_low": 0.7, "quality_high": 0.8, "seeds": 3},
        {"label": "r=64", "step_seconds": 3.0, "quality": 0.625},
        {"label": "r=256", "step_seconds": 0.5, "quality": None, "seeds": 3, "diverged": 1},
    ]
    cases = [
        memory_case("lora", "toy", **of_card),
        CaseRecord(
            "benchmarks/test_memory_plan.py::test_planned[big]", "test_memory_plan", "passed", None, {"plan": plan}
        ),
        CaseRecord(
            "benchmarks/test_quality.py::test_rank[toy]",
            "test_quality",
            "passed",
            None,
            {**subject("lora", "toy"), "pareto": sweep},
        ),
    ]
    return save(results, 4, cases, machine=CARD)


COSTS = {
    "full": (9_000_000_000, 5.1, 0.97, 134_515_008),
    "lora": (1_600_000_000, 2.6, 0.72, 1_843_200),
    "qlora": (900_000_000, 2.8, 0.81, 1_843_200),
    "bottleneck": (1_580_000_000, 2.4, 0.55, 2_525_040),
    "prefix": (1_450_000_000, 2.2, 0.1, 230_400),
    "prompt": (1_500_000_000, 2.5, 0.05, 11_520),
    "ia3": (1_470_000_000, 2.25, 0.4, 57_600),
}
"""Peak bytes, step over control, quality and trainable parameters of the methods in `many_methods`."""


def many_methods(results: Path) -> Path:
    """One run of a third machine with all seven methods: memory, time and quality, and one unsteady step."""
    cases = []
    for method, (peak, ratio, _, params) in COSTS.items():
        more = {"trainable_params": params, "percent_of_base": params / 1_345_150, "adapter_disk_bytes": 4 * params}
        memory = memory_case(method, "small", extra=peak - PEAK, planned_device_bytes=peak + 800_000_000, **more)
        step = step_case(method, "small", ratio=ratio)
        step.metrics["unsteady"] = ["drifting"] if method == "prompt" else []
        cases += [memory, step]
    points = [
        {"label": method, "peak_bytes": peak, "trainable_params": params, "quality": quality, "seeds": 3, "diverged": 0}
        | {"quality_low": quality - 0.04, "quality_high": quality + 0.02}
        for method, (peak, _, quality, params) in COSTS.items()
    ]
    about = {"model": "small", "task": "calendar", "pareto": points}
    cases.append(CaseRecord("benchmarks/test_methods_quality.py::test_methods_on_text", "q", "passed", metrics=about))
    machine = {**CPU, "name": "third-box"}
    return save(results, 5, cases, [claim("holds", "lora-ratio", "small")], machine=machine)
