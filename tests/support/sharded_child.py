"""One rank of a real sharded step on gloo, followed as the planner follows its own: prints the trace as JSON.

``python -m tests.support.sharded_child RANK RANKS FOLDER CASES``; CASES is JSON: [method, strategy, settings] each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from peft_gauge.counting import count
from peft_gauge.plan.record import PlanRequest
from peft_gauge.plan.sharded_step import follow_sharded
from peft_gauge.training import methods, models
from peft_gauge.training.sharding import Sharding
from peft_gauge.training.step import StepSettings

BATCH, SEQ = 2, 16


def request(method: str, strategy: str, ranks: int, settings: dict[str, Any], **further: Any) -> PlanRequest:
    return PlanRequest(
        models.resolve("toy-llama"),
        methods.get(method),
        StepSettings(BATCH, SEQ, **settings),
        dtype="float32",
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


def main() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    found = []
    for method, strategy, settings in json.loads(sys.argv[4]):
        asked = request(method, strategy, ranks, settings)
        base = models.build(asked.model, dtype=asked.dtype, attn_implementation=asked.attention)
        own = list(base.parameters())
        model = methods.attach(base, asked.method, grad_checkpointing=asked.settings.grad_checkpointing)
        found.append(described(follow_sharded(asked, model, own, count(model), [], mesh=mesh)))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
