"""Plans a training step: the very code that is measured, run on tensors without data, and followed storage by storage.

The model is built and adapted on ``meta``; its parameters become fake tensors that behave as CUDA's
(`peft_gauge.plan.fakes`); one steady step of `peft_gauge.training.step.TrainingJob` runs on them while every storage
allocation and release is recorded (`peft_gauge.memory.tracker`); and the log is replayed through a model of CUDA's
caching allocator (`peft_gauge.memory.allocator`). Every transformer block is traced; no result is extrapolated from
fewer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import time
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge._internals.torch import unset_fake_temporarily
from peft_gauge.counting import ParameterCount, constant_buffers, count, quantisation_constants
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.fingerprint.places import UNKNOWN, Places
from peft_gauge.memory.overheads import overheads_for
from peft_gauge.memory.tracker import (
    ACTIVATIONS,
    ADAPTER_WEIGHTS,
    BACKWARD,
    BASE_WEIGHTS,
    BUFFERS,
    DEQUANTISED_TEMPORARIES,
    FORWARD,
    HOST,
    INPUTS,
    LOGITS_AND_LOSS,
    OPERATOR_CATEGORY,
    OPTIMIZER,
    OPTIMIZER_STATE,
    QUANTISATION_CONSTANTS,
    Snapshot,
    StorageTracker,
    no_collector,
    rounded,
)
from peft_gauge.plan import fakes, flash_attention, policies
from peft_gauge.plan.call import ModelCall, chunk_loss
from peft_gauge.plan.record import Plan
from peft_gauge.plan.reserve import Steps, device_estimate, fit
from peft_gauge.traces.log import planned
from peft_gauge.traces.sites import site_here
from peft_gauge.training import methods, models, stored_layers, targets
from peft_gauge.training.step import StepSettings, TrainingJob

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from peft_gauge.memory.overheads import DeviceOverheads
    from peft_gauge.plan.record import DeviceEstimate, PlanRequest
    from peft_gauge.traces.log import StepLog
    from peft_gauge.training.models import ModelRecord

TRACED_MICRO_BATCHES = 3
"""Accumulated micro-batches after the second differ in nothing: the first makes the gradients, the second adds to them,
the third shows that the second was steady."""

ELEMENTWISE = (
    *OPERATOR_CATEGORY,
    stored_layers.DEQUANTIZE,
    "bitsandbytes::optimizer_",
    "bitsandbytes::int8_vectorwise_quant",
)
"""Names, or their beginnings, of library operators without matrix products."""

PAGED_FROM_ELEMENTS = 100_000  # bitsandbytes: smaller states are not paged (optim/optimizer.py, get_state_buffer)
LARGEST_TENSOR_BYTES = 2**62  # what a step may ask of one tensor before sizes overflow 64 bits


def plan(request: PlanRequest) -> Plan:
    """What the step of ``request`` will need; on any machine, without a GPU, in seconds.

    Raises `GaugeError` for what does not fit together, and where an operation needs values that a plan has not (the
    message names it).
    """
    started = time.perf_counter()
    notes = [*models.remarks(request.model), *_check_sizes(request)]
    traced, adapted_modules = _traced(request, notes)
    return replace(_as_plan(request, traced, notes, started), adapted_modules=adapted_modules, base=_base(request))


def step_log(request: PlanRequest) -> tuple[StepLog, tuple[str, ...]]:
    """The planned step of ``request``: each allocation with its operator, module and Python function, to be compared
    with a recorded one (`peft_gauge.traces.comparison`); and what was assumed. Raises as `plan` does.
    """
    notes = [*models.remarks(request.model), *_check_sizes(request)]
    traced, _ = _traced(request, notes, located=True)
    return planned(traced.tracker), tuple(notes)


def _traced(
    request: PlanRequest, notes: list[str], *, located: bool = False
) -> tuple[Trace, tuple[targets.Adapted, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' advice on training; what matters here is in `notes`
        try:
            return _trace(request, notes, located=located)
        except policies.CannotPlan as error:
            raise GaugeError(f"{request.name} cannot be planned: {error}") from error
        except GaugeError:
            raise
        except Exception as error:  # an operation without a shape rule, or one that needs values
            raise GaugeError(f"{request.name} cannot be planned: {_operation(error)}") from error


@contextlib.contextmanager
def stepping(request: PlanRequest, model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Entered around the step on fake tensors, inside the fake mode, for what it needs beyond shapes; adds to ``notes``
    what is done in place of the library's own code."""
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(policies.stepping(model))
        stack.enter_context(stored_layers.kernels())
        stack.enter_context(_attention_package(request.attention))
        if _quant_format(request) == "int8":
            notes.append("int8: planned without outlier columns, whose number depends on the activations' values")
            stack.enter_context(fakes.cuda_int8_products())
        yield
    notes += said


def _quant_format(request: PlanRequest) -> str | None:
    """bitsandbytes' format of the base, as the checkpoint stores it or as the method quantises it."""
    stored, quantization = request.model.stored, request.method.quantization
    if stored is not None:
        return stored.settings.get("quant_format") if stored.kind == "bitsandbytes" else None
    return None if quantization is None else quantization.quant_format


def _double_quant(request: PlanRequest) -> bool | None:
    stored, quantization = request.model.stored, request.method.quantization
    if _quant_format(request) is None:
        return None
    if stored is not None:
        return bool(stored.settings.get("bnb_4bit_use_double_quant", False))
    return None if quantization is None else quantization.double_quant


def _base(request: PlanRequest) -> str:
    """How the base's weights are held, and who says so."""
    if request.model.stored is not None:
        return request.model.stored.description
    quantization = request.method.quantization
    return request.dtype if quantization is None else f"{quantization.quant_format.upper()}, quantised by the method"


@dataclass(frozen=True)
class Trace:
    """One steady step: its log, and what was alive at the moments that a plan reports.

    ``made_after_update``: storages (`Event.storage`) that a run makes once, right after its first update.
    """

    tracker: StorageTracker
    made_after_update: frozenset[int]
    counted: ParameterCount
    peak: Snapshot
    resident: Snapshot
    live_outputs_bytes: int
    saved_activation_bytes: int
    flops: int


def _check_sizes(request: PlanRequest) -> Iterator[str]:
    settings = request.settings
    limit = request.model.max_positions
    if limit is not None and settings.seq > limit:
        yield f"a sequence of {settings.seq} tokens is beyond {request.model.name}'s {limit} positions"
    width = max(request.model.vocab_size, settings.seq)
    if settings.batch * settings.seq * width * 8 > LARGEST_TENSOR_BYTES:
        raise GaugeError(f"batch {settings.batch} × sequence {settings.seq} overflows 64-bit sizes; make them smaller")


def _operation(error: BaseException) -> str:
    """The operation that failed, out of torch's error about it."""
    operator = getattr(error, "func", None)
    detail = f"{type(error).__name__}: {one_line(error, 200)}"
    return f"{operator} needs values ({detail})" if operator is not None else detail


# --- the model ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _meta_base(record: ModelRecord, dtype: str, attention: str | None) -> PreTrainedModel:
    with _attention_package(attention):
        return models.build(record, device="meta", dtype=dtype, attn_implementation=attention, as_stored=False)


def _attention_package(attention: str | None) -> contextlib.AbstractContextManager[None]:
    return flash_attention.package() if attention == flash_attention.NAME else contextlib.nullcontext()


@dataclass(frozen=True)
class _Adapted:
    model: nn.Module
    base_parameters: frozenset[int]  # ids
    modules: tuple[targets.Adapted, ...]


def _adapt(request: PlanRequest, notes: list[str]) -> _Adapted:
    """The model on ``meta`` with its method attached; the base is built once for all methods and copied."""
    method, settings = request.method, request.settings
    if _quant_format(request) is not None or settings.optimizer.endswith("8bit"):
        from peft_gauge.training.quantization import load_bitsandbytes

        load_bitsandbytes()
    base = copy.deepcopy(_meta_base(request.model, request.dtype, request.attention))
    if request.model.stored is not None:
        stored_layers.store_(base, request.model.stored)
    base = methods.prepare_base(base, method)
    ids, places = frozenset(map(id, base.parameters())), targets.Places.of(base)
    notes += _unquantised(base, request)
    if models.is_recurrent(base):
        notes.append(
            "recurrent layers are planned as transformers' PyTorch code computes them; with kernels for them "
            "(mamba-ssm, causal-conv1d, flash-linear-attention) a step needs less"
        )
    reentrant = settings.grad_checkpointing and request.checkpoint_reentrant
    if reentrant:
        methods.check_checkpointing(method)
    with policies.attaching(method) as said:
        attached = methods.attach(
            base,
            replace(method, quantization=None, prepare_kbit=False),  # done just above
            grad_checkpointing=settings.grad_checkpointing and not reentrant,
        )
    notes += [*said, *_unmatched(method, base, places)]
    if reentrant:
        base.enable_input_require_grads()  # else reentrant checkpointing trains nothing but the last block
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        attached.train()
    if request.loss == "chunked":
        chunk_loss(base)
    return _Adapted(attached, ids, () if method.kind == "full" else targets.adapted(attached, places))


def _unmatched(method: methods.Method, base: PreTrainedModel, places: targets.Places) -> Iterator[str]:
    """The targets of an adapter config that this architecture has not: PEFT adapts the others without a word."""
    named = method.peft_config.get("target_modules")
    if isinstance(named, list):  # else a pattern, PEFT's own default, or ours for the architecture
        missing = targets.unmatched(named, places.modules)
        if missing:
            yield f"target_modules that {base.config.model_type} has not, and PEFT passes over: {', '.join(missing)}"


def _unquantised(base: nn.Module, request: PlanRequest) -> Iterator[str]:
    """What of a base that ``request`` quantises is not, and what that costs: why QLoRA can need more than LoRA."""
    if request.method.quantization is None:
        return
    from peft_gauge.training.quantization import left_unquantised

    left = left_unquantised(base)
    numels = {where: sum(parameter.numel() for parameter in held) for where, held in left.items()}
    total, itemsize = sum(numels.values()), models.torch_dtype(request.dtype).itemsize
    is_cast = request.method.prepare_kbit and itemsize < 4
    has_experts = any("experts" in where for where in numels)
    if not is_cast and not has_experts:
        return
    largest = [where for where in sorted(numels, key=lambda where: -numels[where]) if numels[where] * 100 >= total]
    parts = [f"{where} {_shown_bytes(numels[where] * itemsize)}" for where in largest]
    rest = total - sum(numels[where] for where in largest)
    parts += [f"the rest {_shown_bytes(rest * itemsize)}"] if rest else []
    sentence = f"not stored in {request.method.quantization.quant_format}: {', '.join(parts)} in {request.dtype}"
    if has_experts:
        sentence += "; bitsandbytes quantises linear layers, not the 3-D parameters that hold a layer's experts"
    if is_cast:
        sentence += (
            f"; k-bit preparation casts all of these to float32, {_shown_bytes(total * 4)}, and with them the "
            f"activations between quantised layers (--no-prepare-kbit leaves both in {request.dtype})"
        )
    yield sentence


def _shown_bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


# --- the step -----------------------------------------------------------------------------------------------


def _trace(
    request: PlanRequest, notes: list[str], *, located: bool = False
) -> tuple[Trace, tuple[targets.Adapted, ...]]:
    adapted = _adapt(request, notes)
    counted = count(adapted.model)
    mode = fakes.fake_mode()
    made = fakes.to_fake(adapted.model, mode)
    base = [made[key] for key in adapted.base_parameters if key in made]
    with mode, fakes.cuda_kernels(), fakes.unpacked_sequences(), stepping(request, adapted.model, notes):
        return follow(request, adapted.model, base, counted, notes, located=located), adapted.modules


def follow(
    request: PlanRequest,
    model: nn.Module,
    base: Iterable[Tensor],
    counted: ParameterCount,
    notes: list[str],
    *,
    located: bool = False,
) -> Trace:
    """Follow one steady step of ``model``, adapted as ``request`` says; ``base`` are its parameters from before.

    The tensors may be fake (inside a fake mode) or real. Adds to ``notes`` what the trace could not see. ``located``:
    also note of each storage which module and which Python function made it, at the cost of some time.
    """
    places = Places(model, fold=False) if located else None
    tracker = StorageTracker(
        vocabulary=request.model.vocab_size,
        operator_categories={**OPERATOR_CATEGORY, stored_layers.DEQUANTIZE: DEQUANTISED_TEMPORARIES},
        workspaces=fakes.CUDA_WORKSPACES,
        where=None if places is None else functools.partial(_where, places),
    )
    _adopt_model(tracker, model, base)
    job, call = _job(request, model, tracker)
    _prime(job, tracker, request.settings, notes)
    importance = _prime_importance(job, model, tracker, notes)
    if places is not None:
        _name_residents(tracker, model, job)
    with no_collector(), places or contextlib.nullcontext():
        trace = _step(job, call, tracker, request, counted, importance)
    tracker.close()
    uncounted = sorted(name for name in tracker.operators_without_flops if not name.startswith(ELEMENTWISE))
    notes += [f"{name}: its operations are not in flops_per_step" for name in uncounted]
    return trace


def _where(places: Places) -> tuple[str, str]:
    module = places.now
    return "" if module == UNKNOWN else module, site_here(sys._getframe(1))


def _name_residents(tracker: StorageTracker, model: nn.Module, job: TrainingJob) -> None:
    """Put down what is there before the step to the module of its parameter."""
    for name, parameter in model.named_parameters():
        state = job.optimizer.state.get(parameter, {}).values()
        held = [parameter, *quantisation_constants(parameter), *(t for t in state if isinstance(t, torch.Tensor))]
        for number in tracker.storages(held):
            tracker.records[number].module = name.rpartition(".")[0]


def _adopt_model(tracker: StorageTracker, model: nn.Module, base: Iterable[Tensor]) -> None:
    tracker.adopt(model.buffers(), BUFFERS)
    tracker.adopt(constant_buffers(model), QUANTISATION_CONSTANTS)
    tracker.adopt(fakes.plain_tensors(model), BUFFERS)
    known = set(map(id, base))
    for parameter in model.parameters():
        tracker.adopt(parameter, BASE_WEIGHTS if id(parameter) in known else ADAPTER_WEIGHTS)
        tracker.adopt(quantisation_constants(parameter), QUANTISATION_CONSTANTS)


def _job(request: PlanRequest, model: nn.Module, tracker: StorageTracker) -> tuple[TrainingJob, ModelCall]:
    settings = request.settings
    tokens = torch.zeros(settings.batch, settings.seq, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens}
    batch |= policies.extra_inputs(model, settings.batch, settings.seq)
    if request.padded:
        batch["attention_mask"] = torch.ones_like(tokens)
    tracker.adopt(batch.values(), INPUTS)
    call = ModelCall(model, use_cache=request.use_cache, hold_outputs=request.hold_outputs or request.use_cache)
    with unset_fake_temporarily():  # 8-bit optimizers come with code books that are made from values
        job = TrainingJob(call, [batch], settings)
    if settings.optimizer in ("adamw", "sgd"):
        # On CUDA this is torch's own choice; fakes say they are on the CPU, where it would be another.
        for group in job.optimizer.param_groups:
            group["foreach"] = True
    return job, call


def _prime(job: TrainingJob, tracker: StorageTracker, settings: StepSettings, notes: list[str]) -> None:
    """Make the optimizer's state, as after the first step of a run, and say which of it the device holds."""
    fakes.prime(job.optimizer)
    fused = job.optimizer.param_groups[0].get("fused")
    paged = 0
    for parameter, state in job.optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            on_host = name == "step" and not fused  # torch keeps the counter of an unfused AdamW on the CPU
            if settings.optimizer.startswith("paged") and name in ("state1", "state2"):
                on_host = parameter.numel() >= PAGED_FROM_ELEMENTS
                paged += value.nbytes if on_host else 0
            tracker.adopt(value, HOST if on_host else OPTIMIZER_STATE)
    if paged:
        notes.append(
            f"paged optimizer: {paged} bytes of its state are managed memory, outside the allocator; they come to the "
            f"device while an update runs, as far as there is room, and are not counted"
        )


def _prime_importance(job: TrainingJob, model: nn.Module, tracker: StorageTracker, notes: list[str]) -> list[Tensor]:
    """Make and return what AdaLoRA and AdaMSS remember of each weight's importance from step to step: a training loop
    does it through ``update_and_allocate``, which `TrainingJob` leaves out because it reads values."""
    known = set(map(id, fakes.plain_tensors(model)))
    for parameter in job.trainable:
        parameter.grad = torch.empty_like(parameter)
    policies.update_importance(model)
    job.clear()
    made = [tensor for tensor in fakes.plain_tensors(model) if id(tensor) not in known]
    if made:
        tracker.adopt(made, BUFFERS)
        notes.append("importance of each weight: its buffers are counted; their update after a step is not traced")
    return made


def _step(
    job: TrainingJob,
    call: ModelCall,
    tracker: StorageTracker,
    request: PlanRequest,
    counted: ParameterCount,
    importance: Iterable[Tensor],
) -> Trace:
    """One step as `TrainingJob.step` takes it, its phases named, and the moments after it."""
    micro_batches = request.settings.grad_accumulation
    traced = min(micro_batches, TRACED_MICRO_BATCHES)
    tracker.start_over()
    made_after_update = tracker.storages(importance)
    with tracker:
        for _ in range(traced):
            with tracker.phase(FORWARD):
                tracker.label(job.forward(), LOGITS_AND_LOSS)
            with tracker.phase(BACKWARD):
                job.backward()
        with tracker.phase(OPTIMIZER):
            job.optimizer_step()
        after = tracker.live(blocks=True)
        job.clear()
        call.let_go()
        resident = tracker.live(blocks=True)
    held = 0 if call.hold_outputs else sum(map(rounded, call.output_bytes))
    return Trace(
        tracker=tracker,
        made_after_update=made_after_update,
        counted=counted,
        peak=tracker.peak(blocks=True),
        resident=resident,
        live_outputs_bytes=after.bytes + held,
        saved_activation_bytes=tracker.kept_bytes(FORWARD, (ACTIVATIONS,)),
        flops=tracker.flops // traced * micro_batches,
    )


# --- the answer ---------------------------------------------------------------------------------------------


def _as_plan(request: PlanRequest, trace: Trace, notes: list[str], started: float) -> Plan:
    steps = Steps(trace.tracker.events, trace.made_after_update)
    overheads = _overheads(request)
    # With one GPU the estimate is of that one, and what a reader adds up is one figure.
    device = device_estimate(steps, overheads[0] if len(overheads) == 1 else None)
    _check_order(request, trace, device)
    gpus = tuple(fit(steps, gpu, each) for gpu, each in zip(request.gpus, overheads, strict=True))
    for found, each in zip(gpus, overheads, strict=True):
        if each.calibration is not None:
            notes.append(f"{found.gpu}: CUDA context and workspaces as calibrated on {each.calibration}")
        if found.fits and found.retries:
            notes.append(
                f"{found.gpu}: fits only because cached segments are given back on the way, which costs time; "
                f"a card without a limit would show {device.total_bytes / 1e9:.2f} GB"
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
        warnings=tuple(notes),
        seconds=time.perf_counter() - started,
    )


def _overheads(request: PlanRequest) -> list[DeviceOverheads]:
    """Those of each GPU of the request."""
    folder = request.calibration_folder
    return [overheads_for(gpu, Path(folder) if folder else None) for gpu in request.gpus]


def _check_order(request: PlanRequest, trace: Trace, device: DeviceEstimate) -> None:
    """Raise `GaugeError` where the replay lost bytes that the trace has: a plan that is too small is no answer."""
    if not trace.peak.bytes <= device.allocated_bytes <= device.reserved_bytes <= device.total_bytes:
        raise GaugeError(
            f"{request.name} cannot be planned: the step's peak is {trace.peak.bytes:,} bytes and its replay has "
            f"{device.allocated_bytes:,} allocated, {device.reserved_bytes:,} reserved; this is a fault of peft-gauge: "
            "please report the command"
        )


@lru_cache(maxsize=8)
def _attention(record: ModelRecord, dtype: str, asked: str | None) -> str:
    """The attention that the step of a request has."""
    return models.attention(_meta_base(record, dtype, asked))


def _settings(request: PlanRequest) -> dict[str, Any]:
    settings, method = request.settings, request.method
    return {
        "batch": settings.batch,
        "seq": settings.seq,
        "dtype": request.dtype,
        "optimizer": settings.optimizer,
        "grad_checkpointing": settings.grad_checkpointing,
        "checkpoint_reentrant": request.checkpoint_reentrant,
        "grad_accumulation": settings.grad_accumulation,
        "clip_grad_norm": settings.clip_grad_norm,
        "quant_format": _quant_format(request),
        "double_quant": _double_quant(request),
        "prepare_kbit": method.prepare_kbit,
        "autocast_adapter_dtype": method.autocast_adapter_dtype,
        "rank": method.peft_config.get("r"),
        "loss": request.loss,
        "padded": request.padded,
        "use_cache": request.use_cache,
        "hold_outputs": request.hold_outputs,
        "attention": _attention(request.model, request.dtype, request.attention),
    }
