"""A training step by DeepSpeed's ZeRO engine (Rajbhandari et al. 2020), as accelerate prepares it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_gauge._internals.deepspeed import (
    accumulation_buffers,
    engine_of,
    gradient_shards,
    has_deepspeed,
    host_buffers,
    master_weights,
    shards_of,
    zero_config,
)
from peft_gauge.counting import quantization_constants
from peft_gauge.errors import GaugeError
from peft_gauge.memory.categories import (
    BUFFERS,
    COMMUNICATION_BUFFERS,
    GRADIENTS,
    HOST,
    OPTIMIZER_STATE,
    QUANTIZATION_CONSTANTS,
)
from peft_gauge.training.step import TrainingJob, build_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from peft_gauge.memory.tracker import StorageTracker
    from peft_gauge.training.settings import StepSettings
    from peft_gauge.training.sharding import Sharding

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
"""Strategy -> the stage: optimizer state in shards; gradients too; weights too."""


def check_zero(dtype: str, settings: StepSettings) -> None:
    """Raise `GaugeError` if DeepSpeed is not installed, or for settings with which its engine is not used here."""
    if not has_deepspeed():
        raise GaugeError(
            "--strategy zero1, zero2 and zero3 run DeepSpeed's own code, which is not installed: "
            "DS_BUILD_OPS=0 pip install deepspeed --no-build-isolation, or choose fsdp2 (which shards like zero3)"
        )
    if dtype == "float16" or settings.mixed_precision == "fp16":
        raise GaugeError("--strategy zero1, zero2 and zero3 are for bfloat16 and float32, not for fp16 yet")


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every floating-point parameter and buffer of ``model`` one of ``dtype``, as the engine does, adapters
    included; tied ones stay tied. It keeps float32 copies of trained weights in its optimizer's shards. Unlike
    `nn.Module.to`, this works on fake tensors."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point() or parameter.dtype == dtype:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


@contextmanager
def zero_job(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    settings: StepSettings,
    *,
    sharding: Sharding,
    dtype: torch.dtype,
    rank: int,
    wrapped: Any = None,
    device: str = "cpu",
) -> Iterator[ZeroJob]:
    """The job of one rank over ``model``, whose weights all have ``dtype`` (`cast`), in the process group that exists.

    ``settings``: of each rank's step. ``wrapped``: called with the engine; returns the module that the job calls.
    """
    config = zero_config(
        STAGES[sharding.strategy],
        dtype=dtype,
        clip_grad_norm=settings.clip_grad_norm,
        micro_batches=settings.grad_accumulation,
        offload=sharding.offload,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(trained, settings, model)
    with engine_of(model, optimizer, config, rank=rank, ranks=sharding.ranks, device=device) as engine:
        yield ZeroJob(engine if wrapped is None else wrapped(engine), batches, settings, engine)


STEPS_BEFORE = 2
"""Steps before a steady one: ZeRO-3 notes the order of modules in the first, and fetches ahead from the second on."""


def adopt_engine(
    tracker: StorageTracker,
    model: nn.Module,
    engine: Any,
    sharding: Sharding,
    category_of: Callable[[str, nn.Parameter], str],
) -> None:
    """Track the tensors that a rank keeps between steps, but for the optimizer's state; ``category_of`` a parameter,
    by its name."""
    for name, parameter in model.named_parameters():
        category = category_of(name, parameter)
        tracker.adopt(parameter, category)
        tracker.adopt(shards_of(parameter), HOST if sharding.offloads_shards else category)
        tracker.adopt(quantization_constants(parameter), QUANTIZATION_CONSTANTS)
    tracker.adopt(model.buffers(), BUFFERS)
    tracker.adopt(master_weights(engine), HOST if sharding.offloads_update else OPTIMIZER_STATE)
    tracker.adopt(gradient_shards(engine), GRADIENTS)
    if sharding.offloads_update:
        tracker.adopt(host_buffers(engine), HOST)
        tracker.adopt(accumulation_buffers(engine), COMMUNICATION_BUFFERS)


class ZeroJob(TrainingJob):
    """A `TrainingJob` whose gradients and updates are DeepSpeed's.

    ``optimizer`` is the one inside the engine: over this rank's float32 shards if weights are 16-bit.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], settings: StepSettings, engine: Any
    ) -> None:
        # The engine clips, and computes in the weights' dtype without autocast.
        own = replace(settings, clip_grad_norm=None, mixed_precision="no")
        super().__init__(model, batches, own, optimizer=engine.optimizer.optimizer)
        self.engine = engine
        self._backwards = 0

    def backward(self) -> None:
        """Add the gradients of the last `forward`; all but the last micro-batch end with the engine's step, which then
        only counts."""
        assert self.loss is not None, "call forward before backward"
        self.engine.backward(self.loss)  # divides by the number of micro-batches
        self.loss = self.loss.detach()
        self._backwards += 1
        if self._backwards % self.settings.grad_accumulation:
            self.engine.step()

    def optimizer_step(self) -> None:
        """Update the weights; the engine clears its gradients."""
        self.engine.step()

    def clear(self) -> None:
        self.loss = None
