"""What is asked of the planner and what it answers, as plain frozen records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from peft_gauge.errors import GaugeError, unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord
    from peft_gauge.training.step import StepSettings
    from peft_gauge.training.targets import Adapted

Loss = Literal["full", "chunked"]
LOSSES: tuple[Loss, ...] = ("full", "chunked")


@dataclass(frozen=True)
class PlanRequest:
    """One training step to be planned: a model, a method and everything that changes the memory of the step.

    Fields:
        model, method: what is trained, and how.
        settings: batch × seq tokens, optimizer, checkpointing, accumulation, clipping.
        dtype: that of the base weights and of a quantized base's arithmetic.
        loss: ``"full"`` as the model computes it, or ``"chunked"``: a stand-in for the chunked losses of training
            libraries (see `peft_gauge.plan.call`).
        padded: whether the batch comes with an attention mask.
        use_cache: whether the model returns its key-value cache, which then lives as long as the outputs.
        hold_outputs: whether the caller keeps the model's outputs until the end of the step, as
            ``outputs = model(**batch)`` does; `peft_gauge.training.step.TrainingJob` lets them go once it has the loss.
        checkpoint_reentrant: the kind of gradient checkpointing, where ``settings.grad_checkpointing`` is on.
        attention: ``"sdpa"`` (CUDA's flash, efficient or math kernel, as CUDA would choose), ``"eager"`` or
            ``"flash_attention_2"``; ``None`` is sdpa where the architecture has it, else eager.
        gpus: names or sizes, as `peft_gauge.memory.gpus.lookup` takes them.
        calibration_folder: measured overheads by GPU (`peft_gauge.memory.overheads`), if there are any.
    """

    model: ModelRecord
    method: Method
    settings: StepSettings
    dtype: str = "bfloat16"
    loss: Loss = "full"
    padded: bool = False
    use_cache: bool = False
    hold_outputs: bool = False
    checkpoint_reentrant: bool = False
    attention: str | None = None
    gpus: tuple[str, ...] = ()
    calibration_folder: str | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if self.method.kind == "full" and self.method.quantization is not None:
            raise GaugeError(f"{self.method.name} trains the base weights, which cannot be quantized; drop --quantize")

    @property
    def name(self) -> str:
        """The case's name in messages."""
        return f"{self.method.name} on {self.model.name}"

    def with_value(self, quantity: str, value: int) -> PlanRequest:
        """The same request with another batch, sequence or rank; raises `GaugeError` where it has none."""
        if quantity == "batch":
            return replace(self, settings=replace(self.settings, batch=value))
        if quantity == "seq":
            return replace(self, settings=replace(self.settings, seq=value))
        if quantity != "rank":
            raise unknown("quantity", quantity, ("batch", "seq", "rank"))
        config = self.method.peft_config
        # AdaLoRA's r is unused (its ranks are init_r and target_r), OFT's is a number of blocks that must divide.
        if self.method.kind != "peft" or "r" not in config or config.get("peft_type") in ("ADALORA", "OFT"):
            raise GaugeError(f"{self.method.name} has no rank to search for; use --find batch or --find seq")
        changed = {**config, "r": value}
        return replace(self, method=replace(self.method, peft_config=changed))


@dataclass(frozen=True)
class DeviceEstimate:
    """A device's memory by parts, in bytes.

    ``allocated_bytes``: the most that is handed out of the segments at once, workspaces included; ``reserved_bytes``:
    the caching allocator's segments, the library workspaces inside them; ``context_bytes``: driver, CUDA context and
    kernels, outside the allocator. ``cublas_workspace_bytes`` and ``cublaslt_workspace_bytes`` are the parts of
    ``reserved_bytes`` that no tensor accounts for. ``origins`` says where each constant is from.
    """

    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    cublas_workspace_bytes: int
    cublaslt_workspace_bytes: int
    origins: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """What the device reports as used by the process."""
        return self.reserved_bytes + self.context_bytes


@dataclass(frozen=True)
class GpuFit:
    """Whether a step fits one GPU.

    ``fits``: the step's allocations, replayed with this GPU's memory less its context, never run out.
    ``device_bytes``: what the GPU will show as used: that replay's segments and the context; where it does not fit,
    what a GPU without a limit would show. ``headroom_bytes``: ``usable_bytes`` less ``device_bytes``, negative where
    it does not fit. ``retries``: how often cached segments had to be given back to make room, which costs time.
    """

    gpu: str
    usable_bytes: int
    device_bytes: int
    fits: bool
    headroom_bytes: int
    retries: int


@dataclass(frozen=True)
class Plan:
    """What one training step needs. Bytes are counted in blocks of 512, to which CUDA's allocator rounds a request;
    what it hands out beyond that, where it does not split a cached block, is in the reserved metrics.

    Fields:
        model, method: names; ``settings``: everything that was assumed.
        trainable_params, total_params: logical parameters, tied ones once.
        phase_of_peak: forward, backward or optimizer.
        peak_bytes: the most that is allocated in a steady step, without library workspaces.
        resident_bytes: what stays between steps, after ``zero_grad``.
        resident_live_outputs_bytes: the same with loss, outputs and gradients alive, as right after
            ``optimizer.step()``.
        allocated_bytes_estimate: what ``torch.cuda.max_memory_allocated`` will show: the peak, library workspaces, and
            what the allocator hands out beyond a request.
        reserved_bytes_estimate: the caching allocator's segments after repeated steps, workspaces included.
        device_bytes_estimate: that and the CUDA context; ``device`` names the parts. Of the GPU that was asked for,
            where it was one; else of a GPU with PyTorch's usual workspaces.
        peak_by_category, resident_by_category: they sum to ``peak_bytes`` and ``resident_bytes``.
        saved_activation_bytes_per_token: what forward keeps for backward of one micro-batch, over its tokens;
            without logits and loss.
        flops_per_step: of matrix products and attention, forward and backward over all micro-batches.
        gpus: one `GpuFit` a GPU that was asked for.
        warnings: what was assumed or could not be seen. ``seconds``: how long planning took.
        adapted_modules: the modules of the base that the method trains something on, each with how many of how many
            decoder blocks have it; empty for full fine-tuning and for virtual tokens.
        base: how the base's weights are held, and who says so: ``"bfloat16"``, ``"FP8, as its config says"``.
    """

    model: str
    method: str
    settings: Mapping[str, Any]
    trainable_params: int
    total_params: int
    phase_of_peak: str
    peak_bytes: int
    resident_bytes: int
    resident_live_outputs_bytes: int
    allocated_bytes_estimate: int
    reserved_bytes_estimate: int
    device_bytes_estimate: int
    device: DeviceEstimate
    peak_by_category: Mapping[str, int]
    resident_by_category: Mapping[str, int]
    saved_activation_bytes_per_token: float
    flops_per_step: int
    gpus: tuple[GpuFit, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    adapted_modules: tuple[Adapted, ...] = ()
    base: str = ""

    @property
    def fits(self) -> bool:
        """Whether the step fits every GPU that was asked for."""
        return all(fit.fits for fit in self.gpus)

    def as_json(self) -> dict[str, Any]:
        """The record as JSON holds it; ``fits`` and ``headroom_bytes`` are objects by GPU."""
        record = asdict(self)
        record["fits"] = {fit.gpu: fit.fits for fit in self.gpus}
        record["headroom_bytes"] = {fit.gpu: fit.headroom_bytes for fit in self.gpus}
        return record


@dataclass(frozen=True)
class PlanFailure:
    """A case that could not be planned, and why, in one line that names the operation."""

    model: str
    method: str
    error: str

    def as_json(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """The largest batch, sequence or rank that fits a GPU.

    ``value`` is ``None`` where even 1 (a sequence: 2) does not fit; ``plan`` is then the plan of that smallest step.
    ``at_limit``: the search ended at ``value`` because nothing larger exists (positions, matrix rank), not because
    of memory. ``tried``: value -> whether it fitted.
    """

    quantity: str
    gpu: str
    value: int | None
    at_limit: bool
    plan: Plan
    tried: Mapping[int, bool] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The plan's record with the search beside it under ``find``."""
        found = {"quantity": self.quantity, "gpu": self.gpu, "value": self.value, "at_limit": self.at_limit}
        return {**self.plan.as_json(), "find": found}


PlanOutcome = Plan | Found | PlanFailure
