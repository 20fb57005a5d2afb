"""Names of DeepSpeed that this suite uses, and accelerate's configuration of it."""

from __future__ import annotations

import pytest
import torch

from peft_gauge._internals.deepspeed import bucket_elements, has_deepspeed, zero_config

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


def test_buckets_have_deepspeeds_size() -> None:
    assert bucket_elements() == 500_000_000
