"""Plans of whole training steps against what they took on an NVIDIA H200 and an H100 (`fixtures/h200_steps.json`,
`fixtures/h100_steps.json`).

Here are the steps that are planned in seconds; `benchmarks/test_published.py` has the others.
"""

from __future__ import annotations

import pytest

from fixtures.measured_steps import MeasuredStep, read_steps
from peft_gauge.memory.overheads import CONTEXT_HOPPER_BYTES
from peft_gauge.plan.planner import plan
from peft_gauge.plan.reserve import OFFLOADING_BYTES

H100 = read_steps("h100")
STEPS = [*read_steps(), *H100]
ROUNDING_BYTES = 512 * 1024
"""Plans count in blocks of 512, the allocator's count of requests does not."""


def is_quick(step: MeasuredStep) -> bool:
    settings = step.settings
    if step.gpu == "h100":  # all methods under Trainer
        others = settings["method"] not in ("full", "lora") and "arguments" not in settings
        return others or "activation_offloading" in settings.get("arguments", {})
    small = settings["model"] in ("toy-llama", "smollm2-135m")
    # TinyLlama: float32 attention with shared heads, recomputed; an update without storages of its own.
    recomputed = settings["method"] == "qlora" and settings.get("ckpt", False)
    fused = settings["method"] == "full" and settings.get("optimizer") in ("adamw-fused", "adamw8bit")
    autocast = settings["method"] == "lora" and settings["dtype"] != "bfloat16" and "mixed" in settings
    if settings["loop"] != "plain":  # a trainer's own loop: everything that TRL does by default, and packed rows
        return settings["method"] == "qlora" or "packing" in settings or "ckpt" in settings
    return small or (settings["model"] == "tinyllama" and (recomputed or fused or autocast))


QUICK = [step for step in STEPS if is_quick(step)]
REPEATED = {
    "lora-tinyllama-4x768-convert=True-dtype=float16-mixed=fp16",  # as with bf16; fp16 is Trainer's below
    "qlora-tinyllama-4x768-loop=trainer-mixed=bf16",  # as with fp16
    "qlora-tinyllama-4x768-dtype=float32-loop=sft",  # `test_traces_h200.py`, to the byte
    "qlora-tinyllama-4x768-ckpt=False-dtype=float32-loop=sft",  # SFTTrainer without it: LoRA's packed rows
    "qlora-tinyllama-4x768-ckpt=True",  # `test_traces_h200.py`
    "lora-tinyllama-4x768-accum=2-ckpt=True-loop=trainer-mixed=bf16",  # parts of it: `test_trainer_step.py`
    "ia3-tinyllama-4x768-loop=trainer-mixed=bf16",  # as LoRA's in `test_traces_h200.py`
    "prompt-tinyllama-4x768-loop=trainer-mixed=bf16",  # as a prefix's
    "full-tinyllama-4x768-optimizer=adamw-fused",  # `test_traces_h200.py`
    "full-tinyllama-4x768-optimizer=adamw8bit",  # parts of it: `test_planner.py`
    "bottleneck-tinyllama-4x768-loop=trainer-mixed=bf16",  # as a prefix's; `test_traces_h200.py`
    "lora-tinyllama-4x768-convert=True-dtype=float32-mixed=bf16",  # `test_traces_h200.py` and `test_autocast.py`
    "qlora-tinyllama-4x768-dtype=float16-loop=trainer-mixed=fp16",  # parts of it: `test_trainer_step.py`
    "full-smollm2-135m-2x256",  # as on toy-llama and TinyLlama
    "lora-smollm2-135m-2x256",
    "qlora-smollm2-135m-2x256",
    "lora-tinyllama-4x768-activation_offloading=True-dtype=float32-loop=sft",  # as without checkpointing
}
"""Quick steps that show what other tests show, too: these are slow, and run every week."""


LIGER = [step for step in H100 if "use_liger_kernel" in step.settings.get("arguments", {})]


@pytest.mark.parametrize("step", LIGER, ids=lambda step: step.id)
def test_with_ligers_kernels_too(step: MeasuredStep) -> None:
    """They change functions of transformers for the whole process; a plan leaves them as they were."""
    pytest.importorskip("liger_kernel", reason="run: nox -s liger")
    plain = next(each for each in H100 if each.settings["method"] == "ia3").request()
    before = plan(plain)
    found = plan(step.request())
    assert found.peak_bytes == pytest.approx(step.peak_bytes, abs=ROUNDING_BYTES)
    assert found.phase_of_peak == "forward"
    assert not found.warnings
    assert plan(plain).peak_by_category == before.peak_by_category


@pytest.mark.parametrize(
    "step",
    [pytest.param(step, id=step.id, marks=pytest.mark.slow if step.id in REPEATED else ()) for step in QUICK],
)
def test_a_plan_is_what_the_gpu_took(step: MeasuredStep) -> None:
    found = plan(step.request())
    assert found.trainable_params == step.trainable_params
    # cuDNN, which an H100 takes attention from, needs less than flash for a prefix's mask, and the sums that make the
    # gradients of a bottleneck's biases more than a plan has: 1.7 and 0.9 MB here.
    apart = step.gpu == "h100" and step.settings["method"] in ("prefix", "bottleneck")
    # TRL takes an address that the allocator hands out again for a tensor that is offloaded already, and leaves that
    # one on the GPU. Which, depends on the segments of the steps before.
    offloads = "activation_offloading" in step.settings.get("arguments", {})
    tolerance = 0.002 * step.peak_bytes if offloads else (4 if apart else 1) * ROUNDING_BYTES
    assert found.peak_bytes == pytest.approx(step.peak_bytes, abs=tolerance)
    # What it hands out, and its segments, depend on the order of frees, too, which autograd's own thread shares.
    assert found.allocated_bytes_estimate == pytest.approx(step.first_steps["allocated_peak"], rel=0.02)
    assert found.reserved_bytes_estimate == pytest.approx(step.first_steps["reserved_peak"], rel=0.09)
    assert found.gpus[0].fits
    if offloads:
        assert found.device.offloading_bytes == OFFLOADING_BYTES
        assert found.device.outside_bytes == step.process_bytes - step.reserved_bytes
    assert (found.device.offloading_bytes > 0) == offloads


def test_no_quick_step_is_left_out_by_mistake() -> None:
    assert len(QUICK) == 23
    assert {step.id for step in QUICK} > REPEATED


def test_the_context_is_what_the_driver_shows_beside_the_segments() -> None:
    offloading = "activation_offloading"  # pinned host memory and a stream of its own take 70 MiB more
    steps = [step for step in STEPS if offloading not in step.settings.get("arguments", {})]
    outside = {step.process_bytes - step.reserved_bytes for step in steps}
    assert max(outside) == CONTEXT_HOPPER_BYTES
    assert min(outside) > 0.95 * CONTEXT_HOPPER_BYTES
    offloaded = [step.process_bytes - step.reserved_bytes for step in STEPS if step not in steps]
    assert offloaded == 2 * [CONTEXT_HOPPER_BYTES + OFFLOADING_BYTES]
