"""The instruments on a CUDA device, against what is known beforehand; every process that uses the GPU is a child.

A child's allocator is fresh and its settings are torch's own, so that sizes can be told to the block. What the tests
judge by is held without a GPU, at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge import isolation, machine, paths
from peft_gauge.measure import PRELOAD
from peft_gauge.measure.calibration import FURTHER, Reading, assumptions, outside_bytes, workspace_bytes
from peft_gauge.memory.overheads import overheads_for, write_calibration
from peft_gauge.plan import ceilings
from peft_gauge.plan.record import Plan, PlanRequest
from peft_gauge.pytest_plugin.workers import process_environment
from peft_gauge.training import methods, models
from peft_gauge.training.cases import BATCHES, Case
from peft_gauge.training.settings import StepSettings

if TYPE_CHECKING:
    from fixtures.plans import Plans
    from peft_gauge.isolation import ProcessOutcome

MIB = 2**20
GIB = 2**30
SEGMENT_BYTES = 2 * MIB  # what torch's allocator takes from the driver is a multiple of it
LIMIT_SECONDS = 300.0
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

# (batch, seq) at which plans are held against the GPU, by model.
SHAPES = {"toy-llama": (8, 128), "smollm2-135m": (2, 256)}
LEAST_OF_PLAN = 0.8
UNSPLIT_BYTES = 2 * MIB
"""A request above 1 MiB may be given up to 1 MiB more than it asked for; of a toy's step that is a lot."""

RecordProperty = Callable[[str, object], None]


def call(function: str, *arguments: Any, preload: Sequence[str] | None = None, **environment: str) -> ProcessOutcome:
    """``function`` of this file in a child with torch's own allocator settings and ``environment``."""
    settings = {name: "" for name in ALLOCATOR_SETTINGS if name in os.environ}
    name = function if ":" in function else f"tests.gpu.test_gpu:{function}"
    variables = {**process_environment(), **settings, **environment}
    return isolation.run(name, *arguments, limit_seconds=LIMIT_SECONDS, environment=variables, preload=preload)


def value_of(outcome: ProcessOutcome) -> Any:
    assert outcome.ended == "done", outcome.reason
    return outcome.value


# What the children do -------------------------------------------------------------------------------------------------


def take_tensors(sizes: list[int]) -> dict[str, Any]:
    """Take and give back a tensor of each size, then a large one with another in a nested phase."""
    import torch

    from peft_gauge.meters import Phases
    from peft_gauge.meters.cuda import CudaMeter

    torch.cuda.init()
    phases = Phases([CudaMeter()])

    def take(nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    for nbytes in sizes:
        with phases.phase(f"take {nbytes}"):
            tensor = take(nbytes)
        with phases.phase(f"give {nbytes}"):
            del tensor
    with phases.phase("outer"):
        outer = take(64 * MIB)
        with phases.phase("inner"):
            inner = take(32 * MIB)
            del inner
        del outer
        with phases.phase("late"):
            pass
    return {reader.phase: reader.by_meter[CudaMeter.name] for reader in phases.readings}


def hold_before_the_driver(nbytes: int) -> dict[str, Any]:
    """What NVML shows before and while a tensor of ``nbytes`` is held, the context there in both."""
    import torch

    from peft_gauge.meters import Phases
    from peft_gauge.meters.nvml import NvmlMeter

    torch.zeros(1, device="cuda")
    phases = Phases([NvmlMeter()])
    with phases.phase("before"):
        pass
    with phases.phase("held"):
        tensor = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
    allocated_bytes = torch.cuda.memory_allocated()
    del tensor
    readings = {reader.phase: reader.by_meter.get(NvmlMeter.name) for reader in phases.readings}
    return {"readings": readings, "allocated_bytes": allocated_bytes, "unavailable": phases.unavailable}


def find_the_device() -> dict[str, str]:
    """The first device's UUID by NVML before CUDA is in use and after, and by torch."""
    import pynvml
    import torch

    from peft_gauge.meters.nvml_device import find_device

    pynvml.nvmlInit()
    before = find_device(0).uuid
    torch.zeros(1, device="cuda")
    return {
        "before": before,
        "after": find_device(0).uuid,
        "torch": str(torch.cuda.get_device_properties(0).uuid),
    }


def fill_up_to(cap_bytes: int, piece_bytes: int) -> None:
    """Take pieces until the allocator, which may have ``cap_bytes`` only, runs out; nobody else on the GPU suffers."""
    import torch

    from peft_gauge.measure.memory import present

    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total_bytes)
    with isolation.watch(lambda: present("cuda")):
        isolation.note(phase="filling")
        held = []
        while True:
            held.append(torch.empty(piece_bytes, dtype=torch.uint8, device="cuda"))


def look_up_a_token_beyond_the_vocabulary() -> None:
    import torch

    from peft_gauge.measure.memory import present

    table = torch.zeros(8, 8, device="cuda")
    with isolation.watch(lambda: present("cuda")):
        isolation.note(phase="lookup")
        torch.nn.functional.embedding(torch.tensor([8], device="cuda"), table)
        torch.cuda.synchronize()


def multiply() -> float:
    import torch

    ones = torch.ones(64, 64, device="cuda")
    return float((ones @ ones).sum())


def quantize_layer_by_layer(folder: str) -> dict[str, int]:
    """The most that was allocated while a 16-bit base was brought to the GPU in 4 bit, and how large it was."""
    import torch

    from peft_gauge.meters import PREPARE, Phases
    from peft_gauge.meters.cuda import CudaMeter

    torch.cuda.init()
    base = models.build(models.resolve(folder, weights="random"), dtype="bfloat16")
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    largest_bytes = max(parameter.nbytes for parameter in base.parameters())
    phases = Phases([CudaMeter()])
    with phases.phase(PREPARE):
        methods.prepare_base(base, methods.QLORA, device="cuda")
    metrics = phases.peaks()[PREPARE][CudaMeter.name]
    return {
        "base_bytes": base_bytes,
        "largest_bytes": largest_bytes,
        "peak_bytes": metrics["allocated_peak_bytes"],
        "kept_bytes": torch.cuda.memory_allocated(),
    }


def begin_on_the_card(nbytes: int) -> dict[str, Any]:
    """What a process finds before it uses the GPU, what a tensor of ``nbytes`` then takes, and who else computes."""
    import torch

    from peft_gauge.meters.nvml import NvmlMeter

    before = {"initialized": torch.cuda.is_initialized()}
    tensor = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    del tensor
    meter = NvmlMeter()
    others = None
    if meter.why_unavailable() is None:
        meter.start_phase("now")
        others = meter.end_phase("now").get("most_other_processes")
    names = ("allocated_bytes.all.peak", "reserved_bytes.all.peak", "allocation.all.allocated", "num_alloc_retries")
    return {"before": before, "stats": {name: stats[name] for name in names}, "others": others}


# Forked processes -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_forked_process_has_a_context_and_an_allocator_of_its_own() -> None:
    """The second finds what the first found, and both find what a new interpreter does: no context, nothing reserved,
    and nobody more on the GPU."""
    first, second = (call("begin_on_the_card", 64 * MIB, preload=PRELOAD) for _ in range(2))
    spawned = call("begin_on_the_card", 64 * MIB)
    assert (first.process, second.process) == ("forked", "forked"), first.why_spawned
    assert value_of(first) == value_of(second) == value_of(spawned)
    assert value_of(first)["before"] == {"initialized": False}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_forked_process_takes_what_a_spawned_one_takes(method: str) -> None:
    forked, spawned = (value_of(call("measure_memory", "toy-llama", method, preload=each)) for each in (PRELOAD, None))
    names = ("allocated_peak_bytes", "reserved_peak_bytes", "tensor_peak_bytes", "resident_bytes")
    assert {name: forked[name] for name in names} == {name: spawned[name] for name in names}
    assert forked["peak_by_category"] == spawned["peak_by_category"]


# torch's allocator ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taken() -> Mapping[str, Mapping[str, int]]:
    return value_of(call("take_tensors", [1, 512, 513, 64 * MIB + 1]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("nbytes", "counted_bytes"), [(1, 512), (512, 512), (513, 1024), (64 * MIB + 1, 64 * MIB + 512)]
)
def test_a_tensor_is_counted_to_the_block(
    nbytes: int, counted_bytes: int, taken: Mapping[str, Mapping[str, int]]
) -> None:
    while_held, after = taken[f"take {nbytes}"], taken[f"give {nbytes}"]
    assert while_held["allocated_bytes"] == while_held["allocated_peak_bytes"] == counted_bytes
    assert after["allocated_bytes"] == 0
    assert after["allocated_peak_bytes"] == counted_bytes, "it was there when the phase began"


@pytest.mark.gpu
def test_segments_are_taken_in_their_unit_and_kept(taken: Mapping[str, Mapping[str, int]]) -> None:
    assert taken["take 1"]["reserved_bytes"] == taken["give 1"]["reserved_bytes"] == SEGMENT_BYTES
    assert all(metrics["reserved_bytes"] % SEGMENT_BYTES == 0 for metrics in taken.values())
    assert taken[f"give {64 * MIB + 1}"]["reserved_bytes"] >= 64 * MIB


@pytest.mark.gpu
def test_nested_phases_keep_their_own_peaks(taken: Mapping[str, Mapping[str, int]]) -> None:
    assert taken["outer"]["allocated_peak_bytes"] == taken["inner"]["allocated_peak_bytes"] == 96 * MIB
    assert taken["inner"]["allocated_bytes"] == 64 * MIB
    assert taken["late"]["allocated_peak_bytes"] == 0


# NVML -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_driver_sees_what_was_allocated(record_property: RecordProperty) -> None:
    found = value_of(call("hold_before_the_driver", GIB))
    if found["unavailable"]:
        pytest.skip(found["unavailable"]["nvml"])
    before, held = found["readings"]["before"], found["readings"]["held"]
    assert held["device_bytes"] >= found["allocated_bytes"] >= GIB
    record_property("device_growth_bytes", held["device_bytes"] - before["device_bytes"])
    record_property("process_bytes", held.get("process_bytes", "not told"))
    if "process_bytes" in held:  # where the driver shows this process, its share needs no quiet GPU
        assert held["process_bytes"] - before["process_bytes"] == pytest.approx(GIB, abs=4 * MIB)
        assert held["process_bytes"] <= held["device_bytes"]


@pytest.mark.gpu
@pytest.mark.parametrize("named_by", ["uuid", "number"])
def test_the_last_card_is_found_under_cuda_visible_devices(named_by: str) -> None:
    driver = machine.nvidia_driver()
    if driver.error is not None:
        pytest.skip(f"NVML does not respond: {driver.error}")
    last = machine.accelerators()[-1]
    if named_by == "uuid":
        if last.uuid is None:
            pytest.skip("this torch does not tell the UUIDs of GPUs")
        visible = last.uuid
    else:
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            pytest.skip("CUDA_VISIBLE_DEVICES is set, and its numbers are those of the whole machine")
        visible = str(len(machine.accelerators()) - 1)
    found = value_of(call("find_the_device", CUDA_VISIBLE_DEVICES=visible, CUDA_DEVICE_ORDER="PCI_BUS_ID"))
    assert found["before"] == found["after"]
    assert found["after"].endswith(found["torch"])
    if named_by == "uuid":
        assert found["torch"] == visible.removeprefix("GPU-").removeprefix("MIG-")


# Ends -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_out_of_memory_is_an_outcome_with_the_last_known_peak() -> None:
    outcome = call("fill_up_to", GIB, 128 * MIB)
    assert outcome.ended == "out-of-memory", outcome.reason
    assert outcome.reason is not None
    assert outcome.reason.startswith("OutOfMemoryError: CUDA out of memory")
    assert outcome.last["phase"] == "filling"
    assert GIB - 128 * MIB <= outcome.last["allocated_peak_bytes"] <= GIB


@pytest.mark.gpu
def test_a_broken_device_ends_one_process_only() -> None:
    outcome = call("look_up_a_token_beyond_the_vocabulary")
    assert outcome.ended == "crashed"
    assert outcome.reason is not None
    assert "device-side assert" in outcome.reason
    assert outcome.last["phase"] == "lookup"
    assert value_of(call("multiply")) == 64.0**3


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overheads() -> dict[str, Any]:
    return dict(value_of(call("peft_gauge.measure.calibration:measure_overheads")))


@pytest.mark.gpu
def test_the_overheads_of_this_card(overheads: dict[str, Any], record_property: RecordProperty, tmp_path: Path) -> None:
    """What is printed (``-s``) can be kept for `peft-gauge plan` as a calibration of this GPU."""
    for name, value in overheads.items():
        record_property(name, value)
    record = {name: value for name, value in overheads.items() if name not in (*FURTHER, "nvml", "allocator")}
    gpu_name = record.pop("gpu_name")
    path = write_calibration(tmp_path, gpu_name, **record)
    print(f"\n{path.name}: {path.read_text()}")
    stored = asdict(overheads_for(gpu_name, tmp_path))
    assert {name: stored[name] for name in record if name.endswith("_bytes")} == {
        name: value for name, value in record.items() if name.endswith("_bytes")
    }
    assert 50e6 <= overheads["bare_context_bytes"] <= overheads["context_bytes"] <= 2e9
    assert 0 < overheads["forward_workspace_bytes"] <= overheads["cublas_workspace_bytes"] <= 256 * MIB
    assert 0 <= overheads["cublaslt_workspace_bytes"] <= 256 * MIB


@pytest.mark.gpu
def test_a_calibration_is_what_plans_for_this_card_then_use(tmp_path: Path) -> None:
    """All of `peft-gauge calibrate`; the allocator's sizes are those that plans replay, to the byte."""
    found = dict(value_of(call("peft_gauge.measure.calibration:calibrate")))
    gpu_name = found.pop("gpu_name")
    write_calibration(tmp_path, gpu_name, **found)
    used = overheads_for(gpu_name, tmp_path)
    assert used.usable_bytes == found["usable_bytes"] == machine.accelerators()[0].memory_bytes
    rows = assumptions(found, used, None)
    assert [row.name for row in rows if not row.holds] == []
    workspace = found["workspaces"]["forward_workspace_bytes"]
    assert found["workspaces"]["further_stream_bytes"] == workspace, "a workspace belongs to a handle and a stream"
    assert found["speed"]["product_flops_per_second"] > 1e12


@pytest.mark.gpu
@pytest.mark.parametrize("method", methods.DEFAULT_METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("model", sorted(SHAPES))
def test_a_step_takes_what_was_planned(
    model: str,
    method: methods.Method,
    plans: Plans,
    overheads: dict[str, Any],
    record_property: RecordProperty,
) -> None:
    (plan,) = plans([request_of(model, method)])
    metrics = value_of(call("measure_memory", model, method.name, preload=PRELOAD))
    margins = replace(
        ceilings.read(paths.fixture("ceilings.toml")).margins,
        workspace_bytes=overheads["cublas_workspace_bytes"] + overheads["cublaslt_workspace_bytes"],
    )
    measured_bytes = metrics["allocated_peak_bytes"]
    without_workspace = measured_bytes - overheads["cublas_workspace_bytes"]
    record_property("planned_peak_bytes", plan.peak_bytes)
    record_property("allocated_peak_bytes", measured_bytes)
    record_property("relative_distance", without_workspace / plan.peak_bytes - 1)
    record_property("tracked_relative_distance", metrics["tensor_peak_bytes"] / plan.peak_bytes - 1)
    assert beyond(measured_bytes, plan, margins) is None


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_traced_step_is_the_planned_one(method: str, tmp_path: Path, record_property: RecordProperty) -> None:
    """Where it is not, `peft-gauge trace` on the same file says where."""
    from peft_gauge.plan.planner import step_log
    from peft_gauge.traces import reader, recorder
    from peft_gauge.traces.comparison import compare

    traced = value_of(call("measure_memory", "smollm2-135m", method, "cuda", str(tmp_path)))["trace"]
    assert "file" in traced, traced
    path = tmp_path / traced["file"]
    assert path.stat().st_size <= recorder.MOST_BYTES
    planned, _ = step_log(request_of("smollm2-135m", methods.get(method)))
    found = compare(planned, reader.step_log(reader.read(path)))
    for phase in found.phases:
        record_property(f"{phase.phase}_allocations", (phase.planned, phase.measured, phase.equal))
    record_property("unplanned_bytes", found.unplanned_bytes)
    assert abs(found.unplanned_bytes) <= 0.01 * found.planned.peak_bytes, found.rows[:5]


@pytest.mark.gpu
def test_a_16_bit_base_is_never_whole_on_the_card(tmp_path: Path, record_property: RecordProperty) -> None:
    found = value_of(call("quantize_layer_by_layer", wide_model(tmp_path)))
    for name, value in found.items():
        record_property(name, value)
    # The largest layer stands there in 16 bit and once more while its blocks are made.
    assert found["peak_bytes"] < found["base_bytes"] // 2 + 2 * found["largest_bytes"]
    assert found["kept_bytes"] < found["base_bytes"] // 2


# What the tests judge by, which needs no GPU --------------------------------------------------------------------------


def request_of(model: str, method: methods.Method) -> PlanRequest:
    batch, seq = SHAPES[model]
    settings = StepSettings(batch=batch, seq=seq)
    return PlanRequest(models.resolve(model, weights="random"), method, settings, dtype=models.default_dtype("cuda"))


def measure_memory(model: str, method: str, device: str = "cuda", traces: str | None = None) -> dict[str, Any]:
    """The memory pass of the case that `request_of` plans; with a trace in the folder ``traces``."""
    from peft_gauge.measure.passes import CaseSetup, measure
    from peft_gauge.training.batches import token_stream

    request = request_of(model, methods.get(method))
    case = Case(request.model, request.method, request.settings, device, request.dtype)
    tokens = BATCHES * request.settings.batch * request.settings.seq
    stream = token_stream(None, vocab_size=int(request.model.config["vocab_size"]), tokens=tokens)
    setup = CaseSetup(case, request.model, stream, passes=("memory",), trace=None if traces is None else Path(traces))
    return dict(measure(setup)["memory"])


def beyond(measured_bytes: int, plan: Plan, margins: ceilings.Margins) -> str | None:
    """What is wrong with a measured allocated peak: above the ceiling of its plan, or so far below that the plan is of
    no use; ``margins`` has this GPU's workspaces."""
    most = margins.ceiling(plan).allocated_bytes + UNSPLIT_BYTES
    least = int(LEAST_OF_PLAN * plan.peak_bytes) + margins.workspace_bytes - UNSPLIT_BYTES
    if least <= measured_bytes <= most:
        return None
    return f"measured {measured_bytes:,} bytes, planned {plan.peak_bytes:,}; allowed are {least:,} to {most:,}"


def wide_model(folder: Path) -> str:
    """A Llama whose weights lie in its linear layers, as those of a large one do: 269 MB in 16 bit."""
    config = json.loads((paths.fixture("models") / "toy-llama" / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps({**config, **sizes, "num_attention_heads": 16}))
    return str(folder)


def test_the_wide_model_fits_in_half_its_size_once_quantized(tmp_path: Path) -> None:
    """The packed linear layers with their constants, and the rest in float32: else no order could keep to the bound."""
    from peft_gauge.training.cases import count_on_meta

    config = json.loads((Path(wide_model(tmp_path)) / "config.json").read_text())
    model = models.resolve(str(tmp_path), weights="random")
    embeddings = 2 * config["vocab_size"] * config["hidden_size"]
    norms = (2 * config["num_hidden_layers"] + 1) * config["hidden_size"]
    total = count_on_meta(model, methods.FULL).total_params
    linear = total - embeddings - norms
    assert linear * (4.127 / 8) + (embeddings + norms) * 4 < total * 2 // 2


@pytest.mark.parametrize(
    ("measured_bytes", "is_beyond"),
    [
        (800_000_000 + 9_000_000 - UNSPLIT_BYTES - 1, True),
        (800_000_000 + 9_000_000 - UNSPLIT_BYTES, False),
        (1_000_000_000, False),
        (1_030_000_000 + 9_000_000 + UNSPLIT_BYTES, False),
        (1_030_000_001 + 9_000_000 + UNSPLIT_BYTES, True),
    ],
)
def test_a_measured_peak_may_be_within_the_margins_of_its_plan(
    measured_bytes: int, is_beyond: bool, plans: Plans
) -> None:
    (planned,) = plans([request_of("toy-llama", methods.PROMPT)])
    plan = replace(planned, peak_bytes=10**9)
    said = beyond(measured_bytes, plan, ceilings.Margins(workspace_bytes=9_000_000))
    assert (said is not None) == is_beyond
    assert said is None or f"measured {measured_bytes:,} bytes, planned 1,000,000,000" in said


def test_the_child_measures_the_case_that_is_planned(plans: Plans) -> None:
    """On a CPU, whose kernels keep other things: the peak is of the same step, so of the same order."""
    (plan,) = plans([request_of("toy-llama", methods.LORA)])
    metrics = value_of(call("measure_memory", "toy-llama", "lora", "cpu", preload=PRELOAD))
    assert 0.5 < metrics["tensor_peak_bytes"] / plan.peak_bytes < 2


def test_the_context_is_what_neither_the_allocator_nor_another_process_has() -> None:
    before = Reading(device_bytes=700 * MIB, process_bytes=None, reserved_bytes=0)
    alone = Reading(device_bytes=1100 * MIB, process_bytes=None, reserved_bytes=2 * MIB)
    assert outside_bytes(before, alone) == 398 * MIB
    shown = replace(alone, device_bytes=9000 * MIB, process_bytes=390 * MIB)
    assert outside_bytes(before, shown) == 388 * MIB


def test_a_workspace_is_what_is_allocated_besides_the_result() -> None:
    assert workspace_bytes(before_bytes=1024, after_bytes=1024 + 512 + 8_519_680, result_bytes=500) == 8_519_680
    assert workspace_bytes(before_bytes=1024, after_bytes=1024 + 512, result_bytes=512) == 0
