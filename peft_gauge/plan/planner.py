"""Plan a training step: run the measured code on tensors without data, and record every storage.

The model is built and adapted on ``meta``. Its parameters become fake tensors that behave as on CUDA
(`peft_gauge.plan.fakes`). One steady step of `peft_gauge.training.step.TrainingJob` runs on them while every storage
allocation and release is recorded (`peft_gauge.memory.tracker`). The log is replayed through a model of CUDA's
caching allocator (`peft_gauge.memory.allocator`). Every transformer block is traced; nothing is extrapolated from
fewer.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge._internals import torchao
from peft_gauge._internals.cut_cross_entropy import has_cut_cross_entropy, release
from peft_gauge._internals.torch import foreach_on_fakes
from peft_gauge.counting import count
from peft_gauge.errors import GaugeError
from peft_gauge.memory.overheads import overheads_for
from peft_gauge.plan import fakes, kernels, policies
from peft_gauge.plan.adaptation import adapt, attention, attention_package, double_quant, quant_format
from peft_gauge.plan.autocast import as_on_cuda
from peft_gauge.plan.call import cut_loss_on_fakes
from peft_gauge.plan.record import Plan
from peft_gauge.plan.reserve import Steps, device_estimate, fit
from peft_gauge.plan.sharded_step import follow_sharded
from peft_gauge.plan.traced_step import Trace, follow
from peft_gauge.plan.trainer_step import follow_trainer, unexpected
from peft_gauge.traces.log import planned
from peft_gauge.training import models, stored_layers, targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from peft_gauge.memory.overheads import DeviceOverheads
    from peft_gauge.plan.record import DeviceEstimate, PlanRequest
    from peft_gauge.traces.log import StepLog

UNCOMPILED = (
    "torchao's state is planned to the byte; its update as it is written, operator by operator, an upper bound: up to "
    "60 bytes for each element of the largest parameter. The compiled update needs less (for a CPU: 8, in 4 bit 26)"
)
LARGEST_TENSOR_BYTES = 2**62  # a larger tensor overflows 64-bit sizes


def plan(request: PlanRequest) -> Plan:
    """Plan the memory of ``request``'s step: on any machine, without a GPU, in seconds.

    Raises `GaugeError` for inconsistent settings, and for an operation that needs values, which a plan does not have
    (the message names it).
    """
    started = time.perf_counter()
    notes = [*models.remarks(request.model), *_check_sizes(request)]
    traced, adapted_modules = _traced(request, notes)
    return replace(_as_plan(request, traced, notes, started), adapted_modules=adapted_modules, base=_base(request))


def step_log(request: PlanRequest) -> tuple[StepLog, tuple[str, ...]]:
    """The planned step of ``request``: each allocation with its operator, module and Python function, for comparison
    with a recorded step (`peft_gauge.traces.comparison`); and the assumptions. Raises as `plan` does.
    """
    notes = [*models.remarks(request.model), *_check_sizes(request)]
    traced, _ = _traced(request, notes, located=True)
    return planned(traced.tracker), tuple(notes)


def _traced(
    request: PlanRequest, notes: list[str], *, located: bool = False
) -> tuple[Trace, tuple[targets.Adapted, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' advice on training; `notes` has what matters for a plan
        try:
            return _trace(request, notes, located=located)
        except policies.CannotPlan as error:
            raise GaugeError(f"{request.name} cannot be planned: {error}") from error
        except GaugeError:
            raise
        except Exception as error:  # an operation without a shape rule, or with need of values
            raise GaugeError(f"{request.name} cannot be planned: {policies.operation(error)}") from error


@contextlib.contextmanager
def stepping(request: PlanRequest, model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Enter around the step on fake tensors, inside the fake mode, to supply values that shapes do not give; adds to
    ``notes`` each replacement of library code."""
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(policies.stepping(model))
        stack.enter_context(foreach_on_fakes())
        stack.enter_context(kernels.as_packed(request.packed))
        if request.loop != "plain" and not request.padded:
            stack.enter_context(kernels.unpadded_sequences())
        stack.enter_context(stored_layers.kernels())
        stack.enter_context(attention_package(request.attention))
        if request.settings.mixed_precision != "no":
            notes += stack.enter_context(as_on_cuda())
        if request.loss == "cce" and has_cut_cross_entropy():
            stack.enter_context(cut_loss_on_fakes())
            notes.append(f"{release()}: its kernels' operations are not in flops_per_step")
        if request.settings.optimizer in torchao.OPTIMIZERS and torchao.has_torchao():
            stack.enter_context(torchao.optimizers_on_fakes())
            notes.append(UNCOMPILED)
        if quant_format(request) == "int8":
            notes.append("int8: planned without outlier columns, whose number depends on the activations' values")
            stack.enter_context(kernels.cuda_int8_products())
        yield
    notes += unexpected(said)


def _trace(
    request: PlanRequest, notes: list[str], *, located: bool = False
) -> tuple[Trace, tuple[targets.Adapted, ...]]:
    adapted = adapt(request, notes)
    counted = count(adapted.model)
    mode = fakes.fake_mode()
    made = fakes.to_fake(adapted.model, mode)
    base = [made[key] for key in adapted.base_parameters if key in made]
    with mode, kernels.cuda_kernels(), stepping(request, adapted.model, notes):
        trace: Callable[..., Trace] = follow if request.sharding is None else follow_sharded
        if request.loop != "plain":
            trace = follow_trainer
        return trace(request, adapted.model, base, counted, notes, located=located), adapted.modules


def _base(request: PlanRequest) -> str:
    """The storage format of the base's weights, and its origin."""
    if request.model.stored is not None:
        return request.model.stored.description
    quantization = request.method.quantization
    if quantization is None:
        return request.dtype
    prepared = "prepared" if request.method.prepare_kbit else "not prepared"
    return f"{quantization.quant_format.upper()}, quantized by the method, {prepared} for k-bit training"


def _check_sizes(request: PlanRequest) -> Iterator[str]:
    settings = request.settings
    limit = request.model.max_positions
    if limit is not None and settings.seq > limit:
        yield f"a sequence of {settings.seq} tokens exceeds {request.model.name}'s {limit} positions"
    width = max(request.model.vocab_size, settings.seq)
    if settings.batch * settings.seq * width * 8 > LARGEST_TENSOR_BYTES:
        raise GaugeError(f"batch {settings.batch} × sequence {settings.seq} overflows 64-bit sizes; make them smaller")


def _as_plan(request: PlanRequest, trace: Trace, notes: list[str], started: float) -> Plan:
    steps = Steps(trace.tracker.events, trace.made_after_update)
    overheads = _overheads(request)
    # With one GPU the estimate is for that GPU, so that its parts add up to the printed total.
    device = device_estimate(steps, overheads[0] if len(overheads) == 1 else None, offloads=trace.offloads)
    _check_order(request, trace, device)
    gpus = tuple(
        fit(steps, gpu, each, offloads=trace.offloads) for gpu, each in zip(request.gpus, overheads, strict=True)
    )
    for found, each in zip(gpus, overheads, strict=True):
        if each.calibration is not None:
            notes.append(f"{found.gpu}: CUDA context and workspaces as calibrated on {each.calibration}")
        if found.fits and found.retries:
            notes.append(
                f"{found.gpu}: fits only because cached segments are released during the step, which costs time; "
                f"a GPU without a limit would show {device.total_bytes / 1e9:.2f} GB"
            )
    return Plan(
        model=request.model.name,
        method=request.method.name,
        settings=_settings(request),
        trainable_params=trace.counted.trainable_params,
        total_params=trace.counted.total_params,
        phase_of_peak=trace.peak.phase,
        peak_bytes=trace.peak.bytes,
        resident_bytes=trace.resident.bytes,
        resident_live_outputs_bytes=trace.live_outputs_bytes,
        allocated_bytes_estimate=device.allocated_bytes,
        reserved_bytes_estimate=device.reserved_bytes,
        device_bytes_estimate=device.total_bytes,
        device=device,
        peak_by_category=trace.peak.by_category,
        resident_by_category=trace.resident.by_category,
        saved_activation_bytes_per_token=trace.saved_activation_bytes / (request.settings.batch * request.settings.seq),
        flops_per_step=trace.flops,
        gpus=gpus,
        communication=trace.communication,
        host_bytes=trace.host_bytes,
        warnings=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _overheads(request: PlanRequest) -> list[DeviceOverheads]:
    """The overheads of each GPU of the request."""
    folder = request.calibration_folder
    return [overheads_for(gpu, Path(folder) if folder else None) for gpu in request.gpus]


def _check_order(request: PlanRequest, trace: Trace, device: DeviceEstimate) -> None:
    """Raise `GaugeError` if the replay has less memory than the trace: then the plan would be too small."""
    if not trace.peak.bytes <= device.allocated_bytes <= device.reserved_bytes <= device.total_bytes:
        raise GaugeError(
            f"{request.name} cannot be planned: the step's peak is {trace.peak.bytes:,} bytes and its replay has "
            f"{device.allocated_bytes:,} allocated, {device.reserved_bytes:,} reserved; this is a bug in peft-gauge: "
            "please report the command"
        )


def _settings(request: PlanRequest) -> dict[str, Any]:
    settings, method = request.settings, request.method
    return {
        "batch": settings.batch,
        "seq": settings.seq,
        "dtype": request.dtype,
        "optimizer": settings.optimizer,
        "grad_checkpointing": settings.grad_checkpointing,
        "checkpoint_reentrant": request.checkpoint_reentrant or (False if request.loop == "plain" else None),
        "grad_accumulation": settings.grad_accumulation,
        "clip_grad_norm": settings.clip_grad_norm,
        "mixed_precision": settings.mixed_precision,
        "float32_outputs": settings.float32_outputs,
        "quant_format": quant_format(request),
        "double_quant": double_quant(request),
        "prepare_kbit": method.prepare_kbit,
        "autocast_adapter_dtype": method.autocast_adapter_dtype,
        "rank": method.peft_config.get("r"),
        "loop": request.loop,
        "loss": request.loss,
        "loss_chunk": request.loss_chunk,
        "padded": request.padded,
        "use_cache": request.use_cache,
        "hold_outputs": request.hold_outputs,
        "attention": attention(request.model, request.dtype, request.attention),
        **({"trainer_arguments": dict(request.trainer_arguments)} if request.trainer_arguments else {}),
        **({} if request.sharding is None else {"sharding": asdict(request.sharding)}),
    }
