"""Private parts of torch.distributed: a process group without processes, and the parts of sharded tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

AXES = ("replicate", "fsdp")
"""The names of the mesh's dimensions; the second is its only one without replicas."""


def mesh_of(device: str, ranks: int, replicas: int = 1) -> Any:
    """A `DeviceMesh` of all ``ranks`` of the process group that exists: of ``replicas`` groups, or one dimension."""
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        return init_device_mesh(device, (ranks,), mesh_dim_names=AXES[1:])
    return init_device_mesh(device, (replicas, ranks // replicas), mesh_dim_names=AXES)


@contextmanager
def group_of_one_rank(ranks: int, device: str = "cpu", replicas: int = 1) -> Iterator[Any]:
    """A mesh of ``ranks`` ranks in this process, which is rank 0; collectives return at once and move no data.

    It is torch's own backend for tests (``fake``), on any ``device``. Enter it outside any fake mode. Guarded by a
    contract test.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield mesh_of(device, ranks, replicas)
    finally:
        dist.destroy_process_group()


def is_distributed(kind: type) -> bool:
    """Whether tensors of ``kind`` are `DTensor`."""
    from torch.distributed.tensor import DTensor

    return issubclass(kind, DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a `DTensor`, whose storage is its memory; another tensor itself. Guarded."""
    from torch.distributed.tensor import DTensor

    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def gathered(model: nn.Module) -> Iterator[torch.Tensor]:
    """The buffers of FSDP2's gathered weights, which exist after the first forward, and are empty in between. Guarded
    by a contract test."""
    for parameter in _fsdp_parameters(model):
        yield from parameter.all_gather_outputs


def _fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params


@contextmanager
def resizes_seen(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call ``seen`` after each resize of a storage: FSDP2 allocates and frees gathered weights so, which no operator
    shows. Guarded by a contract test."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        seen(storage)
        return found

    with patch.object(torch.UntypedStorage, "resize_", resize_):
        yield


@contextmanager
def ddp_on_fakes(reduced: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While active, `DistributedDataParallel` can be built and used on fake tensors; ``reduced`` is called with each
    bucket instead of an all-reduce.

    It does not compare shapes with other processes. Its first buckets are those that a run rebuilds after its first
    step, in the order of gradients (here the reverse of the parameters'), since rebuilding reads values. Guarded by a
    contract test.
    """
    import torch.distributed as dist
    from torch.nn.parallel import distributed

    class Wrapped(distributed.DistributedDataParallel):
        def __init__(self, module: nn.Module, **options: Any) -> None:
            super().__init__(module, init_sync=False, **options)
            self.register_comm_hook(None, hook)
            self.reducer: Any = _Reducer(self.reducer)

    def hook(state: object, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        reduced(bucket.buffer())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    hook.__annotations__.clear()  # torch compares them with its classes, and these are strings
    assign = dist._compute_bucket_assignment_by_size

    def assign_rebuilt(parameters: list[Any], limits: list[int], is_sparse: list[bool]) -> tuple[Any, Any]:
        first = [dist._DEFAULT_FIRST_BUCKET_BYTES, _BUCKET_BYTES]
        order = range(len(parameters))[::-1]
        found = assign([parameters[i] for i in order], first, [is_sparse[i] for i in order], list(order))
        return found[0][::-1], found[1][::-1]  # DDP reverses them

    with (
        patch.object(dist, "_compute_bucket_assignment_by_size", assign_rebuilt),
        patch.object(distributed, "_verify_param_shape_across_processes", lambda *arguments: None),
        patch.object(torch.nn.parallel, "DistributedDataParallel", Wrapped),
    ):
        yield


_BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's default


class _Reducer:
    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False
