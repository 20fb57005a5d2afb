"""Private parts of accelerate. Nothing is imported before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

# --- mixed precision ----------------------------------------------------------------------------------------


def scale_losses(accelerator: Any, scaler: Any) -> None:
    """Make ``accelerator`` use fp16 as on CUDA, with ``scaler``, before it prepares a model: on a CPU it silently
    leaves out autocast and the scaler. Guarded by a contract test."""
    accelerator.native_amp = True
    accelerator.scaler = scaler


# --- memory -------------------------------------------------------------------------------------------------


@contextmanager
def without_collection() -> Iterator[None]:
    """Leaves out the collection of garbage with which a trainer begins, before it has allocated anything: it goes
    through every object of every library, and is half the time of a small model's plan. Guarded by a contract test."""
    from accelerate.utils import memory

    if not hasattr(memory, "gc"):
        yield
        return
    with patch.object(memory, "gc", SimpleNamespace(collect=lambda: 0)):
        yield


# --- sharding -----------------------------------------------------------------------------------------------


def prepare_fsdp2(model: Any, mesh: Any, *, mixed_precision: str, packed: bool, reshard_after_forward: bool) -> Any:
    """accelerate's own preparation of a model for FSDP2, with its transformer-based wrapping, over ``mesh``, of one
    dimension or, for hybrid sharding, two.

    An `Accelerator` on a CPU silently ignores its FSDP plugin and takes DDP, so its function is called with the
    attributes that it reads. ``packed``: whether the model has packed 4-bit weights, with which accelerate casts no
    trained parameter to float32; it looks for the name of their class, which fakes do not have. Guarded by a contract
    test.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=reshard_after_forward,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=[*mesh.mesh_dim_names]),
        device=next(model.parameters()).device,
        mixed_precision="no" if packed else mixed_precision,  # read for casts only
        is_main_process=False,  # no remarks
    )
    return fsdp2_prepare_model(accelerator, model)
