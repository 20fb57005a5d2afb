"""One rank of a real sharded step on gloo, followed as the planner follows its own (`run_rank`)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peft_gauge._internals.distributed import mesh_of
from peft_gauge.counting import count
from peft_gauge.plan.record import PlanRequest
from peft_gauge.plan.sharded_step import follow_sharded
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.sharding import Sharding, shard

BATCH, SEQ = 2, 16


def request(method: str, strategy: str, ranks: int, settings: dict[str, Any], **further: Any) -> PlanRequest:
    """``settings``: of the step, its ``dtype``, and ``replicas`` and ``offload`` of its sharding."""
    settings = dict(settings)
    dtype = settings.pop("dtype", "float32")
    further = {"replicas": settings.pop("replicas", 1), "offload": tuple(settings.pop("offload", ())), **further}
    return PlanRequest(
        models.resolve("toy-llama"),
        methods.get(method),
        StepSettings(BATCH, SEQ, **settings),
        dtype=dtype,
        attention="eager",  # CUDA chooses another kernel than the CPU for sdpa
        sharding=Sharding(ranks, strategy, **further),  # type: ignore[arg-type]
    )


def described(trace: Any) -> dict[str, Any]:
    """The facts of a trace that a plan reports."""
    return {
        "peak": [trace.peak.bytes, trace.peak.by_category, trace.peak.phase],
        "resident": [trace.resident.bytes, trace.resident.by_category],
        "saved": trace.saved_activation_bytes,
        "flops": trace.flops,
        "communication": {name: [each.calls, each.sent_bytes] for name, each in trace.communication.items()},
    }


GRADIENTS = [("full", "fsdp2"), ("lora", "fsdp2"), ("full", "ddp")]


def gradients_of(asked: PlanRequest, rank: int, mesh: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step on ``rank``'s data, by parameter: of one process, or those that all of ``mesh`` reduce.

    LoRA's B is not zero, so that all of them are not.
    """
    config = (
        {**asked.method.peft_config, "init_lora_weights": False, "lora_dropout": 0.0}
        if asked.method.kind == "peft"
        else {}
    )
    base = models.build(asked.model, dtype=asked.dtype, attn_implementation=asked.attention)
    model = methods.attach(base, replace(asked.method, peft_config=config))
    if mesh is not None:
        assert asked.sharding is not None
        model = shard(model, asked.sharding, asked.settings, mesh)
    tokens = torch.arange(BATCH * SEQ).view(BATCH, SEQ) * (7 + 4 * rank) % 251
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)()
            found[name.removeprefix("module.")] = whole.contiguous()
    return found


def run_rank(rank: int, ranks: int, place: str, cases: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    """Write the traces of ``cases`` (method, strategy, settings) to ``RANK.json`` in the folder ``place``, where the
    ``ranks`` processes meet. Without cases, rank 0 saves the gradients of `GRADIENTS` there.
    """
    warnings.simplefilter("ignore")  # DeepSpeed uses names that torch no longer likes
    import torch.distributed as dist

    torch.set_num_threads(1)
    folder = Path(place)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    mesh = mesh_of("cpu", ranks)
    found = []
    for method, strategy, settings in cases:
        asked = request(method, strategy, ranks, settings)
        assert asked.sharding is not None
        mesh = mesh_of("cpu", ranks, asked.sharding.replicas)
        base = models.build(asked.model, dtype=asked.dtype, attn_implementation=asked.attention)
        own = list(base.parameters())
        model = methods.attach(base, asked.method, grad_checkpointing=asked.settings.grad_checkpointing)
        found.append(described(follow_sharded(asked, model, own, count(model), [], mesh=mesh)))
    for method, strategy in [] if found else GRADIENTS:
        gradients = gradients_of(request(method, strategy, ranks, {}), rank, mesh)
        if rank == 0:
            save_file(gradients, folder / f"{method}-{strategy}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
