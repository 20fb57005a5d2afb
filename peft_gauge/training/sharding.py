"""How a training step is split over several processes, one per GPU: by FSDP2, DDP or DeepSpeed's ZeRO, as accelerate
prepares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from peft_gauge.errors import GaugeError, unknown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peft_gauge.training.settings import StepSettings

Strategy = Literal["fsdp2", "ddp", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

PARAMS, OPTIMIZER = "params", "optimizer"
OFFLOADS: dict[Strategy, tuple[tuple[str, ...], ...]] = {
    "fsdp2": ((PARAMS,),),
    "zero1": ((OPTIMIZER,),),
    "zero2": ((OPTIMIZER,),),
    "zero3": ((OPTIMIZER,), (PARAMS,), (PARAMS, OPTIMIZER)),
}
"""Strategy -> the choices of ``offload``."""

MOST_RANKS = 65_536


@dataclass(frozen=True)
class Sharding:
    """The processes of a training step, and what each of them holds.

    Fields:
        gpus: processes on each node, one per GPU.
        strategy: ``"fsdp2"`` (`torch.distributed.fsdp.fully_shard`: weights, gradients and optimizer state in shards,
            one unit per decoder block, embedding and head, as accelerate's transformer-based wrapping has it),
            ``"ddp"`` (a whole copy each, with gradients averaged in buckets), or a stage of DeepSpeed's ZeRO:
            ``"zero1"`` (optimizer state in shards), ``"zero2"`` (gradients too), ``"zero3"`` (weights too).
        nodes: machines. All ranks share one group, unless there are ``replicas``.
        reshard_after_forward: for FSDP2, whether a block's gathered weights are released after its forward and
            gathered again for its backward (ZeRO-3), or kept in between (ZeRO-2).
        offload: the parts that stay in host memory. ``("params",)`` under FSDP2: shards of weights and gradients and
            the optimizer's state, and the update runs there (`torch.distributed.fsdp.CPUOffloadPolicy`). Under ZeRO
            ``"optimizer"``: the optimizer's state, with float32 weights and their gradients, and the update
            (``offload_optimizer``); under ZeRO-3 also ``"params"``: shards of weights (``offload_param``).
        replicas: for FSDP2, groups of ranks that each hold all shards (hybrid sharding, HSDP): weights are gathered
            within a group, and gradients averaged over the groups, which usually are the nodes.

    Raises `GaugeError` for numbers that no launcher accepts.
    """

    gpus: int
    strategy: Strategy = "fsdp2"
    nodes: int = 1
    reshard_after_forward: bool = True
    offload: tuple[str, ...] = ()
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise unknown("strategy", self.strategy, STRATEGIES)
        if self.gpus < 1 or self.nodes < 1 or self.ranks > MOST_RANKS:
            raise GaugeError(
                f"--gpus and --nodes must be at least 1, and {MOST_RANKS:,} ranks at most; "
                f"got {self.gpus} and {self.nodes}"
            )
        if self.strategy != "fsdp2" and not self.reshard_after_forward:
            raise GaugeError(f"--no-reshard-after-forward is for --strategy fsdp2, not for {self.strategy}")
        if self.offload:
            self._check_offload()
        if self.replicas != 1:
            self._check_replicas()

    def _check_offload(self) -> None:
        possible = [",".join(each) for each in OFFLOADS.get(self.strategy, ())]
        if ",".join(self.offload) not in possible:
            raise GaugeError(
                f"--offload {','.join(self.offload)} is not possible with --strategy {self.strategy}, which offloads "
                f"{' or '.join(possible) or 'nothing'}"
            )

    def _check_replicas(self) -> None:
        if self.strategy != "fsdp2":
            raise GaugeError(f"--replicate is for --strategy fsdp2, not for {self.strategy}")
        if self.replicas < 1 or self.ranks % self.replicas or self.shards < 2:
            raise GaugeError(
                f"--replicate must divide the number of GPUs into groups of at least 2: {self.ranks} GPUs, "
                f"--replicate {self.replicas}"
            )

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.gpus * self.nodes

    @property
    def shards(self) -> int:
        """Ranks of a group, each with one of its shards."""
        return self.ranks // self.replicas

    @property
    def offloads_shards(self) -> bool:
        """Whether shards of weights stay in host memory."""
        return PARAMS in self.offload

    @property
    def offloads_update(self) -> bool:
        """Whether the update runs in host memory."""
        return OPTIMIZER in self.offload or (self.strategy == "fsdp2" and self.offloads_shards)

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed shards the step."""
        return self.strategy.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds a part of the weights only."""
        return self.strategy in ("fsdp2", "zero3")


def shard(model: nn.Module, sharding: Sharding, settings: StepSettings, mesh: Any) -> nn.Module:
    """``model``, prepared for one rank of ``mesh`` (`peft_gauge._internals.distributed.mesh_of`).

    The process group must exist. FSDP2 changes the model in place; its parameters become `DTensor`, in float32 where
    they are trained under mixed precision, as accelerate does it. Raises `GaugeError` if no block was wrapped, which
    would gather the whole model at once.
    """
    if sharding.strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        # accelerate's defaults (`DistributedDataParallelKwargs`), on the model's device.
        return DistributedDataParallel(model, process_group=mesh.get_group())
    from peft_gauge._internals.accelerate import prepare_fsdp2

    prepared: nn.Module = prepare_fsdp2(
        model,
        mesh,
        mixed_precision=settings.mixed_precision,
        packed=any(getattr(parameter, "quant_state", None) is not None for parameter in model.parameters()),
        reshard_after_forward=sharding.reshard_after_forward,
    )
    wrapped = units(prepared)
    if len(wrapped) <= 1:
        raise GaugeError(
            f"{type(model).__name__} names no block to shard (_no_split_modules), so that FSDP2 would gather the whole "
            "model at once; choose --strategy ddp"
        )
    return prepared


def packed_dtype(sharding: Sharding | None, dtype: str, mixed_precision: str) -> torch.dtype | None:
    """The dtype in which packed 4-bit weights are stored; ``None``: bitsandbytes' own. FSDP and ZeRO-3 shard floats
    only, and cast those that do not have its compute dtype."""
    if sharding is None or not sharding.shards_weights:
        return None
    return compute_dtype(dtype, mixed_precision)


def compute_dtype(dtype: str, mixed_precision: str) -> torch.dtype:
    """The dtype of matrix products: autocast's, else that of the base weights."""
    from peft_gauge.training.models import torch_dtype
    from peft_gauge.training.step import AUTOCAST_DTYPES

    return AUTOCAST_DTYPES.get(mixed_precision) or torch_dtype(dtype)


def units(model: nn.Module) -> list[str]:
    """The paths of the modules that FSDP2 gathers one at a time; ``""`` is the model itself."""
    from torch.distributed.fsdp import FSDPModule

    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
