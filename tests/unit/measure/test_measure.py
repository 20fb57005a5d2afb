"""The measurement of a case against jobs and readings that are known beforehand, to the byte and to the last digit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import test_memory as memory_benchmark
from fixtures.measured import Measured
from peft_gauge import meters
from peft_gauge.clock.rounds import Round, Rounds, StoppingRule, Stopwatch, WarmUp
from peft_gauge.clock.steadiness import DeviceState, HostState
from peft_gauge.errors import GaugeError
from peft_gauge.fingerprint import fingerprint, record_step
from peft_gauge.isolation import ProcessOutcome
from peft_gauge.measure import Pass, memory, passes, speed
from peft_gauge.measure.passes import CaseSetup
from peft_gauge.measure.slopes import Line, lines
from peft_gauge.plan import ceilings
from peft_gauge.plan.ceilings import Ceiling
from peft_gauge.plan.record import PlanRequest
from peft_gauge.training import cases, methods, models
from peft_gauge.training.batches import cut
from peft_gauge.training.cases import Case
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob
from tests.support.planted_cases import plan_of

N = 1000  # trainable weights of `Product`
F32 = 4
BATCH, SEQ = 2, 8
STREAM = torch.arange(4 * BATCH * SEQ)
SCALARS = 3 * F32  # the loss over the number of micro-batches, its gradient, and that of the loss


class Product(nn.Module):
    """loss = Σ (token · w)², with N weights w, three times as many frozen ones that do nothing, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(N))
        self.frozen = nn.Parameter(torch.ones(3 * N), requires_grad=False)
        self.register_buffer("buffer", torch.zeros(10, dtype=torch.float64))

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=7)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> Any:
        x = input_ids.to(torch.float32).unsqueeze(-1)
        y = x * self.w
        return SimpleNamespace(loss=(y * y).sum())


def product_job(optimizer: str = "sgd") -> TrainingJob:
    settings = StepSettings(BATCH, SEQ, optimizer=optimizer)
    job = TrainingJob(Product(), cut(STREAM, batch=BATCH, seq=SEQ), settings)
    job.warm_up()
    return job


def measured_memory(job: TrainingJob, *shapes: tuple[int, int], trains_base: bool = False) -> dict[str, Any]:
    with memory.watched("cpu") as phases:
        return memory.memory_pass(job, phases, STREAM, shapes, trains_base=trains_base)[1]


RESIDENT = {"adapter_weights": N * F32, "base_weights": 3 * N * F32, "buffers": 80, "inputs": 64 * 8}


def activations(tokens: int) -> int:
    """The most at once, in backward: x; y, and its gradient by either factor of y·y."""
    return F32 * tokens + 3 * F32 * tokens * N


# The memory pass -----------------------------------------------------------------------------------------------------


def test_tensors_are_counted_to_the_byte() -> None:
    found = measured_memory(product_job())
    tokens = BATCH * SEQ
    assert found["resident_by_category"] == RESIDENT
    assert found["resident_bytes"] == sum(RESIDENT.values()) == 16_592
    peak = {**RESIDENT, "activations": activations(tokens) + SCALARS, "logits_and_loss": F32}
    assert found["peak_by_category"] == peak
    assert found["tensor_peak_bytes"] == sum(peak.values()) == 208_672
    assert found["phase_of_peak"] == "backward"
    assert found["saved_activation_bytes_per_token"] == F32 + F32 * N  # x and y


def test_the_optimizers_state_is_resident_and_its_counter_on_the_host_is_not() -> None:
    found = measured_memory(product_job("adamw"))
    assert found["resident_by_category"] == {**RESIDENT, "optimizer_state": 2 * N * F32}


def test_where_the_base_is_trained_there_is_no_adapter() -> None:
    found = measured_memory(product_job(), trains_base=True)
    assert found["resident_by_category"] == {
        "base_weights": 4 * N * F32,
        "buffers": 80,
        "inputs": 64 * 8,
    }


def test_the_peak_grows_by_what_a_row_and_a_token_take() -> None:
    job = product_job()
    batches, settings = job.batches, job.settings
    found = measured_memory(job, (1, SEQ), (BATCH, SEQ // 2), (1, SEQ // 2))
    assert [(point["batch"], point["seq"]) for point in found["shapes"]] == [(2, 8), (1, 8), (2, 4), (1, 4)]
    token = F32 + 3 * F32 * N
    base = sum(RESIDENT.values()) + SCALARS + F32
    assert lines(found["shapes"], "tensor_peak_bytes") == [
        Line("batch", 4, 4 * token, base),
        Line("batch", 8, 8 * token, base),
        Line("seq", 1, token, base),
        Line("seq", 2, 2 * token, base),
    ]
    assert (job.batches, job.settings) == (batches, settings)  # what comes after is measured at the case's own shape


Reading = Mapping[str, int | None]


class Synthetic:
    """A meter with planted readings: phase -> the metrics of its runs, the last of them for all further ones."""

    sees = resolution = "planted"

    def __init__(self, name: str, readings: Mapping[str, Sequence[Reading]], reason: str | None = None) -> None:
        self.name, self.reason = name, reason
        self.readings = {phase: list(runs) for phase, runs in readings.items()}

    def why_unavailable(self) -> str | None:
        return self.reason

    def start_phase(self, name: str) -> None:
        pass

    def end_phase(self, name: str) -> Mapping[str, int | None]:
        runs = self.readings.get(name, [{}])
        return runs.pop(0) if len(runs) > 1 else runs[0]


ALLOCATOR = {
    meters.WHOLE_STEP: [
        {"allocated_peak_bytes": 700, "reserved_peak_bytes": 900, "fragmented_peak_bytes": 50, "alloc_retries": 2},
        {"allocated_peak_bytes": 750, "reserved_peak_bytes": 800, "fragmented_peak_bytes": 60, "alloc_retries": 1},
    ],
    meters.FORWARD: [{"allocated_peak_bytes": 600}],
}


def planted_memory(monkeypatch: pytest.MonkeyPatch, *planted: Synthetic) -> dict[str, Any]:
    monkeypatch.setattr(memory, "meters_of", lambda device: list(planted))
    return measured_memory(product_job())


def nvml(before: Reading, step: Reading, reason: str | None = None) -> Synthetic:
    return Synthetic("nvml", {memory.BEFORE: [before], meters.WHOLE_STEP: [step]}, reason)


def test_the_greatest_of_the_metered_steps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = nvml({"device_peak_bytes": 300}, {"device_peak_bytes": 2000, "process_peak_bytes": 1500})
    monkeypatch.setitem(memory.STEPS, "cpu", memory.STEPS["cuda"])  # the planted job is on the CPU
    found = planted_memory(monkeypatch, Synthetic("cuda allocator", ALLOCATOR), driver)
    assert found["allocated_peak_bytes"] == 750
    assert found["reserved_peak_bytes"] == 900
    assert found["fragmented_peak_bytes"] == 60
    assert found["alloc_retries"] == 3  # over both
    assert found["device_peak_bytes"] == 2000
    assert found["process_peak_bytes"] == found["own_device_peak_bytes"] == 1500
    assert found["phases"][meters.FORWARD]["cuda allocator"] == {"allocated_peak_bytes": 600}
    assert (
        found["shapes"][0].items() >= {"batch": BATCH, "allocated_peak_bytes": 750, "reserved_peak_bytes": 900}.items()
    )
    assert found["meters"].keys() == {"cuda allocator", "nvml", "tensors"}


def test_without_the_process_the_device_less_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = nvml({"device_peak_bytes": 300}, {"device_peak_bytes": 2000, "process_peak_bytes": None})
    found = planted_memory(monkeypatch, driver)
    assert found["own_device_peak_bytes"] == 1700
    assert "process_peak_bytes" not in found


@pytest.mark.parametrize(
    ("before", "step"),
    [
        ({"device_peak_bytes": None}, {"device_peak_bytes": 2000}),
        ({}, {"device_peak_bytes": 2000, "process_peak_bytes": None}),
        ({"device_peak_bytes": 300}, {"device_peak_bytes": None}),
        ({"device_peak_bytes": 300}, {}),
    ],
)
def test_what_the_driver_does_not_tell_is_absent(
    before: Reading, step: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "own_device_peak_bytes" not in planted_memory(monkeypatch, nvml(before, step))


def test_a_figure_that_cannot_be_read_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Synthetic("cuda allocator", {meters.WHOLE_STEP: [{"allocated_peak_bytes": 700, "ooms": None}]})
    found = planted_memory(monkeypatch, allocator, nvml({}, {}, reason="NVML does not respond: no permission"))
    assert found["allocated_peak_bytes"] == 700
    absent = {"reserved_peak_bytes", "fragmented_peak_bytes", "device_peak_bytes", "rss_peak_bytes", "ooms"}
    assert not absent & found.keys()
    assert found["unavailable"] == {"nvml": "NVML does not respond: no permission"}
    assert "nvml" not in found["meters"]


# What a reading right after loading shows ----------------------------------------------------------------------------


def test_tied_weights_are_loaded_once() -> None:
    model = nn.Module()
    model.one, model.two = nn.Linear(30, 20, bias=False), nn.Linear(30, 20, bias=False)
    assert memory.allocated_bytes(model) == 2 * 600 * F32
    model.two.weight = model.one.weight
    assert memory.allocated_bytes(model) == 600 * F32
    model.view = nn.Parameter(model.one.weight.detach().view(-1))  # another tensor, the same bytes
    model.register_buffer("buffer", torch.zeros(3, dtype=torch.float64))
    assert memory.allocated_bytes(model) == 600 * F32 + 24


def test_a_4_bit_weight_is_as_large_as_its_packed_bytes_and_constants() -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(128, 64, bias=False, compress_statistics=False, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(64, 128)})
    layer.to("cpu")
    weights, block = 64 * 128, 64
    # Two weights a byte, a float32 a block, and the 16 values of the code.
    assert memory.allocated_bytes(layer) == weights // 2 + weights // block * F32 + 16 * F32


# Lines ---------------------------------------------------------------------------------------------------------------


def test_a_line_goes_through_each_two_points_that_differ_in_one_size() -> None:
    points = [{"batch": b, "seq": s, "peak": 1000 + 7 * b * s} for b, s in ((4, 64), (2, 64), (4, 32), (2, 32))]
    assert lines(points, "peak") == [
        Line("batch", 32, 224, 1000),
        Line("batch", 64, 448, 1000),
        Line("seq", 2, 14, 1000),
        Line("seq", 4, 28, 1000),
    ]


def test_points_without_the_figure_are_passed_over() -> None:
    points = [{"batch": 1, "seq": 8, "peak": 10}, {"batch": 2, "seq": 8}, {"batch": 4, "seq": 8, "peak": 40}]
    assert lines(points, "peak") == [Line("batch", 8, 10, 0)]
    assert lines(points[:2], "peak") == lines(points, "other") == []


# The time pass -------------------------------------------------------------------------------------------------------


def rounds_of(*rounds: Round, control: tuple[float, ...] = ()) -> Rounds:
    return Rounds(rounds, control, warm_up_rounds=2, warmed_up=True, stopped="2 rounds", relative_noise=None)


def test_laps_become_samples_by_the_devices_clock() -> None:
    laps = [(Round(0.5, 0.125), Round(0.25, 0.25), Round(0.125, 0.0625)), (Round(9, 1), Round(9, 2), Round(9, 3))]
    found = speed._record(rounds_of(Round(0.9, 0.4375, laps[0]), Round(9, 6, laps[1]), control=(0.25, 0.5)))
    assert found["samples"] == {
        "forward_seconds": [0.125, 1],
        "backward_seconds": [0.25, 2],
        "optimizer_seconds": [0.0625, 3],
        "step_seconds": [0.4375, 6],
    }
    assert found["host_step_seconds"] == [0.9, 9]
    assert found["control_seconds"] == [0.25, 0.5]
    assert (found["warm_up_rounds"], found["warmed_up"], found["stopped"]) == (2, True, "2 rounds")
    assert found["relative_noise"] is None


def test_without_a_devices_clock_the_hosts_is_told_once() -> None:
    laps = (Round(1, None), Round(2, None), Round(3, None))
    found = speed._record(rounds_of(Round(6, None, laps)))
    assert found["samples"]["backward_seconds"] == [2]
    assert "host_step_seconds" not in found
    assert found["control_seconds"] == []


def test_a_step_that_has_no_laps_has_no_phases() -> None:
    assert speed._record(rounds_of(Round(6, None)))["samples"] == {"step_seconds": [6]}


class FakeCuda:
    """Stands in for `torch.cuda`; its events count the milliseconds of a clock that jobs move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return 2 * self.now  # the host's clock, which is not the device's

    def synchronize(self) -> None:
        pass

    def work(self, seconds: float) -> Any:
        def advance() -> None:
            self.now += seconds

        return advance

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: 1000 * (other.at - event.at)
        return event


class PlantedNvml:
    """Two readings of the GPU's state, or an error in place of one."""

    states: list[DeviceState | GaugeError]
    others: int | None
    reason: str | None

    def why_unavailable(self) -> str | None:
        return self.reason

    def start_phase(self, name: str) -> None:
        pass

    def end_phase(self, name: str) -> dict[str, int | None]:
        return {"most_other_processes": self.others}

    def state(self) -> DeviceState:
        state = self.states.pop(0)
        if isinstance(state, GaugeError):
            raise state
        return state


FAST = DeviceState(1980, 650_000, 55, ())
SLOW = DeviceState(1410, 700_000, 84, ("HwThermalSlowdown",))
CALM = HostState(10.0, 4, 100.0, 50.0, 0.0)


def timed_on_a_card(
    monkeypatch: pytest.MonkeyPatch,
    *states: DeviceState | GaugeError,
    others: int | None = None,
    reason: str | None = None,
    hosts: tuple[HostState, HostState] = (CALM, CALM),
    warm_up: WarmUp = WarmUp(least=2, window=1),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """The record of a job whose forward, backward and update take 2, 4 and 1 s of the device."""
    cuda = FakeCuda()
    planted = type("Nvml", (PlantedNvml,), {"states": list(states), "others": others, "reason": reason})
    readings = iter(hosts)
    monkeypatch.setattr(speed, "NvmlMeter", planted)
    monkeypatch.setattr(speed, "host_state", lambda: next(readings))
    monkeypatch.setattr(speed, "Stopwatch", lambda device: Stopwatch(device, clock=cuda, torch_cuda=cuda))
    job = SimpleNamespace(
        trainable=[SimpleNamespace(device=torch.device("cuda"))],
        model=nn.Linear(10, 5),
        settings=StepSettings(1, 8),
        forward=cuda.work(2),
        backward=cuda.work(4),
        optimizer_step=cuda.work(1),
        clear=cuda.work(100),  # between two rounds: no part of them
    )
    rule = StoppingRule(min_rounds=3, max_rounds=3)
    found = speed.speed_pass(job, rule, warm_up, None)  # type: ignore[arg-type]
    # Gradients are dropped before each round, and after the last.
    assert cuda.now == (found["warm_up_rounds"] + 3) * (100 + 7) + 100
    return found


def test_a_card_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed_on_a_card(monkeypatch, FAST, FAST, others=0)
    assert found["samples"] == {
        "forward_seconds": [2, 2, 2],
        "backward_seconds": [4, 4, 4],
        "optimizer_seconds": [1, 1, 1],
        "step_seconds": [7, 7, 7],
    }
    assert found["host_step_seconds"] == [14, 14, 14]
    assert found["unsteady"] == []
    fast = {"sm_clock_mhz": 1980, "power_milliwatts": 650_000, "temperature_celsius": 55, "slowdowns": ()}
    assert found["states"] == {"before": fast, "after": fast}
    assert "states_unavailable" not in found
    assert found["weights_read_bytes"] == (50 + 5) * F32


def test_every_reason_for_doubt_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    # In 10 s of 4 cores, 30 s went to others and 2 s to the hypervisor.
    busy = HostState(20.0, 4, 140.0, 60.0, 2.0)
    short = WarmUp(most=2, window=3)
    found = timed_on_a_card(monkeypatch, FAST, SLOW, others=2, hosts=(CALM, busy), warm_up=short)
    assert found["unsteady"] == [
        "other processes took 75.0 % of 4 cores",
        "the hypervisor kept back 5.0 % of 4 cores (steal)",
        "throttled at the end: HwThermalSlowdown",
        "SM clock fell from 1980 to 1410 MHz",
        "2 other processes compute on this GPU",
        "still getting faster after 2 warm-up rounds",
    ]


def test_a_card_that_does_not_tell_its_state_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed_on_a_card(monkeypatch, reason="NVML does not respond: Driver Not Loaded")
    assert found["states_unavailable"] == "NVML does not respond: Driver Not Loaded"
    assert "states" not in found
    assert found["unsteady"] == []
    assert found["samples"]["step_seconds"] == [7, 7, 7]


def test_a_card_that_is_lost_on_the_way_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed_on_a_card(monkeypatch, FAST, GaugeError("NVML does not respond: GPU is lost"), others=3)
    assert found["states_unavailable"] == "NVML does not respond: GPU is lost"
    assert "states" not in found


def test_a_forward_reads_all_weights_but_those_it_looks_up() -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 16), nn.Linear(16, 100, bias=False))
    job: Any = SimpleNamespace(model=model)
    assert speed.weights_read_bytes(job) == (8 * 16 + 16 + 1600) * F32
    tied = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100, bias=False))
    tied[1].weight = tied[0].weight
    assert speed.weights_read_bytes(SimpleNamespace(model=tied)) == 800 * F32  # type: ignore[arg-type]


# A whole case in this process ----------------------------------------------------------------------------------------


def setup_of(method: str, *wanted: Pass) -> CaseSetup:
    case = Case(models.resolve("toy-llama"), methods.get(method), StepSettings(2, 16), "cpu", "float32")
    stream = torch.arange(4 * 32) % 256
    return CaseSetup(case, case.model, stream, wanted, rule=StoppingRule(2, 2), warm_up=WarmUp(least=1, most=1))


@pytest.mark.integration
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_case_is_measured_whole(method: str) -> None:
    setup = setup_of(method, "memory", "speed")
    found = passes.measure(setup)
    assert found["gradients"] == {"missing": [], "not_finite": []}
    assert found["learned"] is True
    counted = cases.count_on_meta(setup.case.model, setup.case.method)
    assert found["counted"]["trainable_params"] == counted.trainable_params
    assert found["counted"]["total_params"] == counted.total_params
    categories = found["memory"]["resident_by_category"]
    # A method that trains the base has no adapter, and only a quantized base has constants.
    weights = categories["base_weights"] + categories.get("adapter_weights", 0)
    weights += categories.get("quantization_constants", 0)
    assert weights == found["counted"]["weight_bytes"]
    assert ("adapter_weights" in categories) == (method != "full")
    assert ("quantization_constants" in categories) == (method == "qlora")
    # AdamW: two of its kind for each trainable weight.
    assert categories["optimizer_state"] == 2 * found["counted"]["trainable_bytes"]
    assert len(found["speed"]["samples"]["step_seconds"]) == len(found["speed"]["control_seconds"]) == 2
    assert found["work_seconds"] > 0


STORAGES = (
    "tensor_peak_bytes",
    "resident_bytes",
    "peak_by_category",
    "resident_by_category",
    "phase_of_peak",
    "saved_activation_bytes_per_token",
)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("method", "accumulated"), [("full", 1), ("lora", 2), ("qlora", 1), ("prefix", 1), ("bottleneck", 2)]
)
def test_the_fingerprints_step_has_the_memory_of_a_step_of_its_own(
    method: str, accumulated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def counted(name: str) -> Any:
        step = getattr(memory, name)

        def call(*args: Any, **options: Any) -> Any:
            taken.append(name)
            return step(*args, **options)

        return call

    for name in ("metered_step", "tracked_step"):
        monkeypatch.setattr(memory, name, counted(name))
    setup = setup_of(method, "memory")
    case = replace(setup.case, settings=replace(setup.case.settings, grad_accumulation=accumulated))
    found = [
        passes.measure(replace(setup, case=case, passes=each)) for each in (("memory",), ("fingerprint", "memory"))
    ]
    assert taken == ["metered_step", "tracked_step", "metered_step"]
    alone, shared = ({name: each["memory"][name] for name in STORAGES} for each in found)
    assert shared == alone
    assert shared["tensor_peak_bytes"] > shared["resident_bytes"] > 0


class Other(Product):
    """A loss that does not use ``labels``, which are a tensor of their own here."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> Any:
        return super().forward(input_ids, input_ids, use_cache)


@pytest.mark.parametrize("other", ["vocabulary", "unused"])
def test_a_step_that_was_tracked_otherwise_does_not_count(other: str) -> None:
    job = product_job()
    if other == "unused":
        batches = [{"input_ids": torch.ones(BATCH, SEQ), "labels": torch.ones(BATCH, SEQ)}]
        job = TrainingJob(Other(), batches, job.settings)
        job.warm_up()
    found: list[dict[str, Any] | None] = []
    job.model.config = SimpleNamespace(vocab_size=8 if other == "vocabulary" else 7)  # type: ignore[assignment]
    record_step(job, job.losses, use=lambda tracker, _: found.append(memory.of_tracker(tracker, job, False)))
    assert found == [None]
    job.model.config = SimpleNamespace(vocab_size=7)  # type: ignore[assignment]
    if other == "vocabulary":
        record_step(job, job.losses[:2], use=lambda tracker, _: found.append(memory.of_tracker(tracker, job, False)))
        assert found[1] == memory.tracked_step(job, False)[1]


def test_a_metered_step_is_looked_at_before_it_is_cleared() -> None:
    job = product_job()
    clock = [0.0]
    weights: list[float] = []

    def look() -> None:
        assert job.loss is not None
        assert job.trainable[0].grad is not None
        weights.append(float(job.trainable[0].detach()[0]))
        clock[0] = time.perf_counter()
        time.sleep(0.05)

    before, start = float(job.trainable[0].detach()[0]), time.perf_counter()
    seconds = memory.metered_step(job, meters.Phases([]), before_clear=look)
    assert 0 < seconds <= clock[0] - start
    assert weights != [before]
    assert job.loss is None
    assert job.trainable[0].grad is None


def test_the_trackers_cost_is_restated_by_the_timed_steps() -> None:
    record = {"meters": {"tensors": {"overhead_times_a_step": 0.75}}}  # 3 s, next to a second step of 4 s
    memory.compare_cost(record, 4.0, [1.0, 2.0, 9.0])
    assert record["meters"]["tensors"]["overhead_times_a_step"] == 1.5


@pytest.mark.integration
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_the_fingerprint_is_a_new_jobs(method: str, accumulated: int) -> None:
    setup = setup_of(method, "fingerprint")
    case = replace(setup.case, settings=replace(setup.case.settings, grad_accumulation=accumulated))
    found = passes.measure(replace(setup, case=case))
    job = cases.build_job(case, stream=setup.stream)
    adapter_bytes = found["counted"]["adapter_disk_bytes"]
    assert found["fingerprint"] == fingerprint(job, adapter_bytes=adapter_bytes, micro_batches=accumulated)


B_WEIGHT = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"


@pytest.mark.integration
def test_a_weight_that_no_gradient_reaches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attach = methods.attach

    def attach_cut_off(*arguments: Any, **options: Any) -> nn.Module:
        model = attach(*arguments, **options)
        up: Any = model.get_submodule(B_WEIGHT.removesuffix(".weight"))
        up.forward = lambda x: nn.functional.linear(x, up.weight.detach())
        return model

    monkeypatch.setattr(methods, "attach", attach_cut_off)
    found = passes.measure(setup_of("lora"))
    assert found["gradients"] == {"missing": [B_WEIGHT], "not_finite": []}
    assert found["learned"] is False


@pytest.mark.integration
def test_a_gradient_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attach = methods.attach

    def attach_spoilt(*arguments: Any, **options: Any) -> nn.Module:
        model = attach(*arguments, **options)
        calls = iter([1.0])  # the first step goes well, for its update would spoil all the others

        def spoil_one_element(gradient: torch.Tensor) -> torch.Tensor:
            factors = torch.ones_like(gradient)
            factors[0, 0] = next(calls, float("nan"))
            return gradient * factors

        model.get_parameter(B_WEIGHT).register_hook(spoil_one_element)
        return model

    monkeypatch.setattr(methods, "attach", attach_spoilt)
    assert passes.measure(setup_of("lora"))["gradients"] == {"missing": [], "not_finite": [B_WEIGHT]}


# The benchmark of benchmarks/test_memory.py ---------------------------------------------------------------------------

PEAK = 5_000_000_000


def measured_on(device: str, batch: int = 3, **metrics: int) -> Measured:
    """A case with a plan of 5 GB (reserved 10, device 15), and these measured metrics."""
    case = Case(models.resolve("toy-llama"), methods.get("lora"), StepSettings(batch, 64), device, "bfloat16")
    plan = plan_of(PlanRequest(case.model, case.method, case.settings), PEAK)
    value = {"memory": {"tensor_peak_bytes": PEAK, **metrics}}
    return Measured(case, plan, (), ProcessOutcome("done", value, None, {}, 1.0, 0.5))


WORKSPACE = ceilings.Margins().workspace_bytes  # on top of the plan above, which has none
CEILINGS = {
    "allocated_peak_bytes": PEAK * 103 // 100 + WORKSPACE,
    "reserved_peak_bytes": -(-(2 * PEAK + WORKSPACE) * 112 // 100),
    "own_device_peak_bytes": -(-(3 * PEAK + WORKSPACE) * 115 // 100),
}


def test_a_case_that_the_table_lacks_has_the_ceiling_of_its_plan() -> None:
    assert memory_benchmark.ceiling_of(measured_on("cuda")) == CEILINGS


def test_a_recorded_ceiling_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def recorded(*case: Any) -> Ceiling:
        asked.append(case)
        return Ceiling(1, 2, 3)

    monkeypatch.setattr(ceilings, "ceiling_for", recorded)
    found = memory_benchmark.ceiling_of(measured_on("cuda"))
    assert found == {"allocated_peak_bytes": 1, "reserved_peak_bytes": 2, "own_device_peak_bytes": 3}
    assert asked == [(ceilings.CeilingKey("toy-llama", "lora", "cuda", "bfloat16", 3, 64),)]
    checkpointed = measured_on("cuda")
    settings = replace(checkpointed.case.settings, grad_checkpointing=True)
    checkpointed = replace(checkpointed, case=replace(checkpointed.case, settings=settings))
    assert memory_benchmark.ceiling_of(checkpointed) == CEILINGS  # the table is of the suite's own settings


@pytest.mark.parametrize("metric", CEILINGS)
def test_a_peak_above_its_ceiling_is_a_line(metric: str) -> None:
    assert memory_benchmark.over_ceiling(measured_on("cuda", **CEILINGS)) == []
    over = measured_on("cuda", **{**CEILINGS, metric: CEILINGS[metric] + 1})
    expected = f"{metric}: {CEILINGS[metric] + 1:,} is above the ceiling of {CEILINGS[metric]:,}"
    assert memory_benchmark.over_ceiling(over) == [expected]


def test_what_was_not_read_is_not_judged() -> None:
    assert memory_benchmark.over_ceiling(measured_on("cuda")) == []
    few = measured_on("cuda", reserved_peak_bytes=10**12)
    assert len(memory_benchmark.over_ceiling(few)) == 1
    assert memory_benchmark.against_plan(few)["relative_error"].keys() == {"reserved_peak_bytes", "tensor_peak_bytes"}


def test_a_cpu_is_not_judged() -> None:
    on_cpu = measured_on("cpu", allocated_peak_bytes=10**15)
    assert memory_benchmark.ceiling_of(on_cpu) is None
    assert memory_benchmark.over_ceiling(on_cpu) == []


def test_the_distance_from_the_plan_is_a_part_of_the_plan() -> None:
    metrics = {
        "allocated_peak_bytes": 5_625_000_000,
        "reserved_peak_bytes": 9_375_000_000,
        "own_device_peak_bytes": 3 * PEAK,
    }
    found = memory_benchmark.against_plan(measured_on("cuda", tensor_peak_bytes=3_750_000_000, **metrics))
    assert found == {
        "planned_peak_bytes": PEAK,
        "planned_allocated_bytes": PEAK,
        "planned_reserved_bytes": 2 * PEAK,
        "planned_device_bytes": 3 * PEAK,
        "planned_saved_activation_bytes_per_token": 512.0,
        "relative_error": {
            "allocated_peak_bytes": 0.125,
            "reserved_peak_bytes": -0.0625,
            "own_device_peak_bytes": 0.0,
            "tensor_peak_bytes": -0.25,
        },
    }
