"""Private parts of DeepSpeed: its ZeRO optimizers on one rank, without other processes. Nothing is imported before it
is used."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import torch
    from torch import nn


def has_deepspeed() -> bool:
    """Whether DeepSpeed is installed."""
    return find_spec("deepspeed") is not None


def release() -> str:
    return f"DeepSpeed {version('deepspeed')}"


def zero_config(
    stage: int,
    *,
    dtype: torch.dtype,
    clip_grad_norm: float | None,
    micro_batches: int,
    offload: Collection[str] = (),
) -> dict[str, Any]:
    """DeepSpeed's configuration as accelerate's `DeepSpeedPlugin` makes it from its defaults (``zero_stage``), so that
    buckets have DeepSpeed's own sizes. ``dtype``: of the weights in training, bfloat16 or float32. ``offload``:
    ``"params"``, ``"optimizer"``; the optimizer stays torch's, with the same state as DeepSpeed's own for CPUs."""
    import torch

    kinds = {"optimizer": "offload_optimizer", "params": "offload_param"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": False,
            **{kinds[each]: {"device": "cpu"} for each in offload},
        },
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": clip_grad_norm or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
    }


@contextmanager
def engine_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    *,
    rank: int,
    ranks: int,
    device: str = "cpu",
) -> Iterator[Any]:
    """DeepSpeed's engine over ``model``, in the process group that exists. Its global state ends with the block.

    On ``device`` "cpu" its kernels for shared memory are not compiled; "cuda" is the accelerator that DeepSpeed finds.
    Guarded by a contract test.
    """
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment))
        deepspeed = _imported(device)
        from deepspeed.accelerator import get_accelerator, set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        for module in (comm, groups):
            stack.enter_context(_restored(module))
        if device == "cpu":
            stack.callback(set_accelerator, get_accelerator())
            set_accelerator(CPU_Accelerator())
            stack.enter_context(patch("deepspeed.comm.torch.build_shm_op", lambda: None))
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=config,
            model_parameters=[each for each in model.parameters() if each.requires_grad],
            dist_init_required=False,
        )
        try:
            yield engine
        finally:
            engine.destroy()


def shards_of(parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """This rank's part of a parameter that ZeRO-3 shards; none of another. Guarded by a contract test."""
    part = getattr(parameter, "ds_tensor", None)
    return () if part is None else (part,)


def master_weights(engine: Any) -> list[torch.Tensor]:
    """This rank's float32 copies of trained weights. Guarded by a contract test."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def gradient_shards(engine: Any) -> list[torch.Tensor]:
    """The buffer for this rank's part of the gradients, which ZeRO-3 keeps. Guarded by a contract test."""
    found = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    return [] if found is None else [found]


def host_buffers(engine: Any) -> list[torch.Tensor]:
    """Tensors that an offloaded update has in host memory, in addition to float32 weights and the optimizer's state:
    gradients, and buffers to copy through. Guarded by a contract test."""
    optimizer = engine.optimizer
    found = [weights.grad for weights in master_weights(engine) if weights.grad is not None]
    found += getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    found += getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
    buffer = getattr(optimizer, "temp_grad_buffer_for_cpu_offload", None)
    return [*found, *([] if buffer is None else [buffer]), *gradient_shards(engine)]


def accumulation_buffers(engine: Any) -> list[torch.Tensor]:
    """The buffer on the GPU, of the largest parameter's size, through which ZeRO-1 and -2 add up gradients that are in
    host memory. Guarded by a contract test."""
    found = getattr(engine.optimizer, "temp_grad_buffer_for_gpu_offload", None)
    return [] if found is None else [found]


def bucket_elements() -> int:
    """Elements of each buffer in which gradients wait to be reduced, by DeepSpeed's default. Guarded by a contract
    test."""
    _imported()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return int(DeepSpeedZeroConfig().reduce_bucket_size)


def _imported(device: str = "cpu") -> Any:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # its remarks would look like this program's output
    try:
        with patch.dict(os.environ, {"DS_ACCELERATOR": device}):
            import deepspeed
    finally:
        logging.disable(disabled)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def _restored(module: Any) -> Iterator[None]:
    """Restore the global variables of ``module``, which hold the process group."""
    kinds = (dict, list, type(None), int, str)
    before = {name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, kinds)}
    try:
        yield
    finally:
        vars(module).update({name: value for name, value in before.items() if not name.startswith("__")})


@contextmanager
def zero_on_fakes() -> Iterator[None]:
    """While active, the engine can be built and take steps on fake tensors.

    A module stays where it is and keeps its dtype, which has to be the configured one. Numbers that the engine reads
    (whether gradients overflowed, their norm, whether ranks agree) are 0: no overflow, no clipping. Guarded by a
    contract test.
    """
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import DataDependentOutputException

    def as_it_is(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        return module

    def or_zero(name: str, zero: Callable[[torch.Tensor], Any]) -> Any:
        read = getattr(torch.Tensor, name)

        def read_or_zero(tensor: torch.Tensor) -> Any:
            try:
                return read(tensor)
            except DataDependentOutputException:
                return zero(tensor)

        return patch.object(torch.Tensor, name, read_or_zero)

    with ExitStack() as stack:
        for name in ("to", "bfloat16", "half"):
            stack.enter_context(patch.object(nn.Module, name, as_it_is))
        stack.enter_context(or_zero("__bool__", lambda tensor: False))
        stack.enter_context(or_zero("__float__", lambda tensor: 0.0))
        stack.enter_context(or_zero("item", lambda tensor: False if tensor.dtype == torch.bool else 0))
        for module in ("utils", "partition_parameters", "partitioned_param_coordinator"):  # collectives move no data
            agree = f"deepspeed.runtime.zero.{module}.assert_ints_same_as_other_ranks"
            stack.enter_context(patch(agree, lambda numbers: None))
        yield
