"""The planner's requests and results, as plain frozen records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from peft_gauge.errors import GaugeError, unknown
from peft_gauge.training.loops import check_loop

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft_gauge.training.loops import Loop
    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord
    from peft_gauge.training.settings import StepSettings
    from peft_gauge.training.sharding import Sharding
    from peft_gauge.training.targets import Adapted

Loss = Literal["full", "chunked", "cce"]
LOSSES: tuple[Loss, ...] = ("full", "chunked", "cce")


@dataclass(frozen=True)
class PlanRequest:
    """One training step to plan: a model, a method and everything that affects the memory of the step.

    Fields:
        model, method: the base and the fine-tuning method.
        settings: batch × seq tokens, optimizer, checkpointing, accumulation, clipping.
        dtype: data type of the base weights, and of a quantized base's compute.
        loss: ``"full"`` as the model computes it, or ``"chunked"``: a model of the chunked losses of training
            libraries (see `peft_gauge.plan.call`), or ``"cce"``: the installed Cut Cross-Entropy; without it, chunked.
            ``loss_chunk``: tokens in a chunk; ``None`` is the default number of chunks.
        padded: whether the batch comes with an attention mask.
        use_cache: whether the model returns its key-value cache, which then lives as long as the outputs.
        hold_outputs: whether the caller keeps the model's outputs until the end of the step, as
            ``outputs = model(**batch)`` does; `peft_gauge.training.step.TrainingJob` releases them once it has the
            loss.
        checkpoint_reentrant: whether gradient checkpointing, if ``settings.grad_checkpointing`` is on, is reentrant;
            ``None`` is the loop's default, for ``plain`` not.
        attention: ``"sdpa"`` (CUDA's flash, efficient or math kernel, as CUDA would choose), ``"eager"`` or
            ``"flash_attention_2"``; ``None`` is sdpa if the architecture supports it, else eager.
        loop: by which loop the step is taken (`peft_gauge.training.loops`). A trainer keeps no outputs, returns no
            cache and computes float32 outputs itself.
        trainer_arguments: further arguments of the trainer, as pairs; they go before ``settings``.
        sharding: the GPUs over which the step is split, each with a micro-batch of its own; ``None`` is one GPU.
        gpus: names or sizes, as for `peft_gauge.memory.gpus.lookup`.
        calibration_folder: measured overheads by GPU (`peft_gauge.memory.overheads`), if any.
    """

    model: ModelRecord
    method: Method
    settings: StepSettings
    dtype: str = "bfloat16"
    loss: Loss = "full"
    loss_chunk: int | None = None
    padded: bool = False
    use_cache: bool = False
    hold_outputs: bool = False
    checkpoint_reentrant: bool | None = None
    attention: str | None = None
    loop: Loop = "plain"
    trainer_arguments: tuple[tuple[str, Any], ...] = ()
    sharding: Sharding | None = None
    gpus: tuple[str, ...] = ()
    calibration_folder: str | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if self.loss_chunk is not None and (self.loss != "chunked" or self.loss_chunk < 1):
            raise GaugeError("--loss-chunk needs --loss chunked, and at least 1 token")
        check_loop(self.loop)
        if self.loop != "plain":
            self._check_trainer()
        if self.method.kind == "full" and self.method.quantization is not None:
            raise GaugeError(f"{self.method.name} trains the base weights, which cannot be quantized; drop --quantize")
        if self.sharding is not None and self.loop != "plain":
            raise GaugeError(f"--gpus is planned for --loop plain, not for --loop {self.loop} yet: drop one of them")
        if self.sharding is not None and self.sharding.is_zero:
            from peft_gauge.training.zero import check_zero

            check_zero(self.dtype, self.settings)

    def _check_trainer(self) -> None:
        """Raise `GaugeError` for a setting that only this suite's own step has."""
        chosen = {
            "--use-cache": self.use_cache,
            "--hold-outputs": self.hold_outputs,
            "--float32-outputs": self.settings.float32_outputs,
            "--optimizer adamw-foreach-off": self.settings.optimizer == "adamw-foreach-off",
            f"--loss {self.loss}": self.loss != "full" and self.loop == "sft",
        }
        for option, is_chosen in chosen.items():
            if is_chosen:
                raise GaugeError(f"{option} is for --loop plain; --loop {self.loop} decides that itself: drop it")

    @property
    def packed(self) -> bool:
        """Whether a row of a batch is several sequences, which attend to themselves only."""
        given = dict(self.trainer_arguments)
        bins = given.get("packing_strategy", "bfd") != "wrapped"
        return self.loop == "sft" and bool(given.get("padding_free") or (given.get("packing") and bins))

    @property
    def name(self) -> str:
        """The case's name in messages."""
        return f"{self.method.name} on {self.model.name}"

    def with_value(self, quantity: str, value: int) -> PlanRequest:
        """The same request with another batch, sequence, rank or number of GPUs (on each node); raises `GaugeError` if
        the method has no rank."""
        if quantity == "batch":
            return replace(self, settings=replace(self.settings, batch=value))
        if quantity == "seq":
            return replace(self, settings=replace(self.settings, seq=value))
        if quantity == "gpus":
            from peft_gauge.training.sharding import Sharding

            sharding = replace(self.sharding or Sharding(value), gpus=value)
            return replace(self, sharding=sharding if sharding.ranks > 1 else None)
        if quantity != "rank":
            raise unknown("quantity", quantity, ("batch", "seq", "rank", "gpus"))
        config = self.method.peft_config
        # AdaLoRA's r is unused (its ranks are init_r and target_r), OFT's is a number of blocks, which must divide the
        # width.
        if self.method.kind != "peft" or "r" not in config or config.get("peft_type") in ("ADALORA", "OFT"):
            raise GaugeError(f"{self.method.name} has no rank to search for; use --find batch or --find seq")
        changed = {**config, "r": value}
        return replace(self, method=replace(self.method, peft_config=changed))


@dataclass(frozen=True)
class Collective:
    """The calls of one collective in a step, and the bytes that each rank sends for them by the ring algorithm."""

    calls: int
    sent_bytes: int


@dataclass(frozen=True)
class DeviceEstimate:
    """A device's memory by parts, in bytes.

    ``allocated_bytes``: the peak of memory in use within the segments, workspaces included; ``reserved_bytes``: the
    caching allocator's segments, library workspaces included; ``context_bytes``: driver, CUDA context and kernels,
    outside the allocator. ``cublas_workspace_bytes`` and ``cublaslt_workspace_bytes`` are the parts of
    ``reserved_bytes`` that belong to no tensor. ``offloading_bytes``: outside the allocator too, for pinned host memory
    and a second stream, if the step offloads activations. ``origins`` has the source of each constant.
    """

    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    cublas_workspace_bytes: int
    cublaslt_workspace_bytes: int
    origins: Mapping[str, str]
    offloading_bytes: int = 0

    @property
    def outside_bytes(self) -> int:
        """The memory outside the allocator."""
        return self.context_bytes + self.offloading_bytes

    @property
    def total_bytes(self) -> int:
        """The memory that the device reports as used by the process."""
        return self.reserved_bytes + self.outside_bytes


@dataclass(frozen=True)
class GpuFit:
    """Whether a step fits one GPU.

    ``fits``: whether the step's allocations, replayed with this GPU's memory less what is outside the allocator, never
    run out. ``device_bytes``: the memory that the GPU will report as used: that replay's segments and the rest; if it
    does not fit, the same for a GPU without a limit. ``headroom_bytes``: ``usable_bytes`` less ``device_bytes``,
    negative if it does not fit. ``retries``: how often cached segments had to be released to make room, which costs
    time.
    """

    gpu: str
    usable_bytes: int
    device_bytes: int
    fits: bool
    headroom_bytes: int
    retries: int


@dataclass(frozen=True)
class Plan:
    """The memory of one training step. Bytes are counted in blocks of 512, to which CUDA's allocator rounds a request;
    if it does not split a cached block, the rest of the block counts in the reserved metrics.

    Fields:
        model, method: names; ``settings``: all assumed settings.
        trainable_params, total_params: logical parameters, tied ones once.
        phase_of_peak: forward, backward or optimizer.
        peak_bytes: peak of allocated memory in a steady step, without library workspaces.
        resident_bytes: memory allocated between steps, after ``zero_grad``.
        resident_live_outputs_bytes: the same with loss, outputs and gradients alive, as right after
            ``optimizer.step()``.
        allocated_bytes_estimate: the expected ``torch.cuda.max_memory_allocated``: the peak, library workspaces, and
            the excess of the allocator's blocks over requests.
        reserved_bytes_estimate: the caching allocator's segments after repeated steps, workspaces included.
        device_bytes_estimate: that and the CUDA context; ``device`` names the parts. For the requested GPU,
            if there is exactly one; else for a GPU with PyTorch's usual workspaces.
        peak_by_category, resident_by_category: they sum to ``peak_bytes`` and ``resident_bytes``.
        saved_activation_bytes_per_token: activations that one micro-batch saves for backward, divided by its tokens;
            without logits and loss.
        flops_per_step: of matrix products and attention, forward and backward over all micro-batches.
        gpus: one `GpuFit` per requested GPU.
        warnings: assumptions and unknowns. ``seconds``: duration of planning.
        adapted_modules: the modules of the base with trainable parameters, each with how many of how many
            decoder blocks have it; empty for full fine-tuning and for virtual tokens.
        base: storage format of the base's weights, and its origin: ``"bfloat16"``, ``"FP8, from its config"``.
        communication: for a sharded step, whose bytes above are one rank's: its collectives by name (``all_gather``,
            ``reduce_scatter``, ``all_reduce``).
        host_bytes: with offloading of shards, the most that a rank keeps in host memory; ``None`` without.
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
    communication: Mapping[str, Collective] = field(default_factory=dict)
    host_bytes: int | None = None

    def _repr_html_(self) -> str:
        """A table for notebooks: the totals, the peak by category, and each GPU."""
        from html import escape

        tokens = "×".join(str(self.settings[name]) for name in ("batch", "seq") if name in self.settings)
        rows = [
            ("peak", self.peak_bytes),
            *((f"· {name}", size) for name, size in sorted(self.peak_by_category.items(), key=lambda each: -each[1])),
            ("between steps", self.resident_bytes),
            ("reserved", self.reserved_bytes_estimate),
            ("device", self.device_bytes_estimate),
        ]
        cells = "".join(
            f"<tr><td>{escape(name)}</td><td style='text-align:right'>{size / 1e9:,.3f} GB</td></tr>"
            for name, size in rows
            if size
        )
        for fit in self.gpus:
            left = f"{abs(fit.headroom_bytes) / 1e9:,.3f} GB {'left' if fit.fits else 'too much'}"
            mark = "✓" if fit.fits else "✗"
            cells += f"<tr><td>{mark} {escape(fit.gpu)}</td><td style='text-align:right'>{left}</td></tr>"
        title = f"{self.method} on {self.model}, {tokens} tokens, peak in {self.phase_of_peak}"
        return f"<table><caption>{escape(title)}</caption>{cells}</table>"

    @property
    def fits(self) -> bool:
        """Whether the step fits every requested GPU."""
        return all(fit.fits for fit in self.gpus)

    def as_json(self) -> dict[str, Any]:
        """The record for JSON; ``fits`` and ``headroom_bytes`` are objects by GPU."""
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
        """The record for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """The largest batch, sequence or rank that fits a GPU, or the fewest such GPUs that hold a step.

    ``value`` is ``None`` if even 1 (a sequence: 2) does not fit, or no number of GPUs; then ``plan`` is the plan of
    that smallest step, or of the most GPUs. ``at_limit``: whether the search ended at ``value`` because no larger value
    exists (positions, matrix rank), not because of memory. ``tried``: value -> whether it fits.
    """

    quantity: str
    gpu: str
    value: int | None
    at_limit: bool
    plan: Plan
    tried: Mapping[int, bool] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The plan's record, with the search under ``find``."""
        found = {"quantity": self.quantity, "gpu": self.gpu, "value": self.value, "at_limit": self.at_limit}
        return {**self.plan.as_json(), "find": found}


PlanOutcome = Plan | Found | PlanFailure
