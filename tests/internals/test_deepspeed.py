"""Names of DeepSpeed that this suite uses, and accelerate's configuration of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_gauge._internals.deepspeed import (
    accumulation_buffers,
    bucket_elements,
    engine_of,
    has_deepspeed,
    host_buffers,
    zero_config,
)
from peft_gauge._internals.distributed import group_of_one_rank

pytestmark = [
    pytest.mark.skipif(not has_deepspeed(), reason="DeepSpeed is not installed; run: nox -s deepspeed"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_and_stages_are_accelerates(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's plugin names no size of a bucket either, and no offloading but to nowhere."""
    bucket_elements()  # imports DeepSpeed for a CPU
    from accelerate.utils import DeepSpeedPlugin

    theirs = DeepSpeedPlugin(zero_stage=stage).deepspeed_config["zero_optimization"]
    assert theirs.pop("offload_optimizer")["device"] == theirs.pop("offload_param")["device"] == "none"
    ours = zero_config(stage, dtype=torch.bfloat16, clip_grad_norm=None, micro_batches=1)["zero_optimization"]
    assert ours == theirs


@pytest.mark.parametrize("offload", [("optimizer",), ("params", "optimizer")])
def test_offloading_is_configured_as_by_accelerate(offload: tuple[str, ...]) -> None:
    bucket_elements()
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(
        zero_stage=3, offload_optimizer_device="cpu", offload_param_device="cpu" if "params" in offload else "none"
    )
    theirs = plugin.deepspeed_config["zero_optimization"]
    ours = zero_config(3, dtype=torch.bfloat16, clip_grad_norm=None, micro_batches=1, offload=offload)
    for name in ("offload_optimizer", "offload_param"):
        device = theirs[name]["device"]
        assert ours["zero_optimization"].get(name, {"device": "none"})["device"] == device


@pytest.mark.parametrize(("stage", "copies"), [(1, 3), (2, 3), (3, 2)])
def test_an_offloaded_update_keeps_its_buffers_under_these_names(stage: int, copies: int) -> None:
    """Stages 1 and 2: float32 gradients, 16-bit copies of the shard and of the largest gradient; stage 3: float32
    gradients, and 16-bit ones as they come from the GPU."""
    model = nn.Linear(8, 8, bias=False).bfloat16()
    config = zero_config(stage, dtype=torch.bfloat16, clip_grad_norm=None, micro_batches=1, offload=["optimizer"])
    optimizer = torch.optim.AdamW(model.parameters())
    with group_of_one_rank(2), engine_of(model, optimizer, config, rank=0, ranks=2) as engine:
        assert len(host_buffers(engine)) == copies
        assert [each.numel() for each in accumulation_buffers(engine)] == ([64] if stage < 3 else [])


def test_buckets_have_deepspeeds_size() -> None:
    assert bucket_elements() == 500_000_000
