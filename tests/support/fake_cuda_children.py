"""What the children of test_fake_cuda.py run, on the GPU of `tests.support.fake_cuda`; each returns what it saw."""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

MIB = 2**20


def several(functions: Sequence[str]) -> dict[str, Any]:
    """What each of these functions of this file returns."""
    return {name: globals()[name]() for name in functions}


def raised(work: Callable[[], object]) -> str:
    """The kind and the words of what ``work`` raises."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def tell_about_the_card() -> dict[str, Any]:
    import torch

    in_use = [torch.cuda.is_initialized()]
    stats = [torch.cuda.memory_stats()]
    found: dict[str, Any] = {"available": torch.cuda.is_available(), "count": torch.cuda.device_count()}
    in_use.append(torch.cuda.is_initialized())
    properties = torch.cuda.get_device_properties(0)
    in_use.append(torch.cuda.is_initialized())
    found |= {
        "name": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "total_bytes": properties.total_memory,
        "uuid": str(properties.uuid),
        "in_use": in_use,
        "stats_before": stats,
        "free": list(torch.cuda.mem_get_info()),
        "unknown": raised(lambda: torch.cuda.caching_allocator_alloc(512)),
        "graph": raised(torch.cuda.CUDAGraph),
        "other_card": raised(lambda: torch.zeros(1, device="cuda:1")),
        "streams": _streams(),
        "bf16": torch.cuda.is_bf16_supported(),
    }
    return found


def _streams() -> list[bool]:
    """Whether the current stream is the default one: before, within and after another one's context."""
    import torch

    def is_default() -> bool:
        return torch.cuda.current_stream() == torch.cuda.default_stream()

    seen = [is_default()]
    with torch.cuda.stream(torch.cuda.Stream()):
        seen.append(is_default())
    return [*seen, is_default()]


def place_tensors() -> dict[str, Any]:
    import torch

    made = {
        "empty": torch.empty(3, device="cuda"),
        "zeros": torch.zeros(3, device=torch.device("cuda", 0)),
        "tensor": torch.tensor([1.0, 2.0], device="cuda"),
        "tensor with gradient": torch.tensor([1.0, 2.0], device="cuda", requires_grad=True),
        "as_tensor": torch.as_tensor([1, 2], device="cuda"),
        "arange": torch.arange(3, device="cuda"),
        "randn": torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(0)),
        "to": torch.ones(3).to("cuda"),
        "to with dtype": torch.ones(3).to("cuda", torch.bfloat16),
        "to an index": torch.ones(3).to(0),
        "cuda": torch.ones(3).cuda(),
        "sum": torch.ones(3, device="cuda") + 1,
        "with a scalar": torch.ones(3, device="cuda") * torch.tensor(2.0),
        "float": torch.ones(3, device="cuda", dtype=torch.bfloat16).float(),
        "like": torch.empty_like(torch.ones(3, device="cuda")),
        "like another": torch.ones(3).to(torch.ones(1, device="cuda")),
        "new": torch.ones(3, device="cuda").new_zeros(2),
        "new tensor": torch.ones(3, device="cuda").new_tensor([1.0]),
        "view": torch.ones(4, device="cuda").view(2, 2)[0],
        "parameter": torch.nn.Parameter(torch.ones(3, device="cuda")),
        "layer": torch.nn.Linear(2, 2).to("cuda").weight,
        "copied layer": copy.deepcopy(torch.nn.BatchNorm1d(2).to("cuda")).get_buffer("running_mean"),
        "copied weight": copy.deepcopy(torch.nn.Linear(2, 2).to("cuda")).weight,
        "from pinned memory": torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        "pinned host": torch.empty(3, pin_memory=True),
        "cpu": torch.ones(3, device="cuda").cpu(),
        "to cpu": torch.ones(3, device="cuda").to("cpu"),
        "host": torch.ones(3),
    }
    x = torch.ones(3, device="cuda")
    with torch.device("cuda"):
        made["in a context"] = torch.ones(3)
        made["from a list in a context"] = torch.tensor([1.0])
        made["from a tensor in a context"] = torch.as_tensor(torch.ones(3, device="cpu"))
    with torch.device("meta"):
        on_meta = [torch.tensor([]), torch.tensor([1.0], device="cuda"), torch.tensor([1.0], device="cpu")]
    return {
        "devices": {name: str(tensor.device) for name, tensor in made.items()},
        "in a context of meta": [str(tensor.device) for tensor in on_meta],
        "is_cuda": [x.is_cuda, x.is_cpu, x.get_device(), torch.ones(1).is_cuda, torch.ones(1).get_device()],
        "same": x.to("cuda") is x,
        "not the same": x.cpu().data_ptr() != x.data_ptr(),
        "values": x.cpu().tolist(),
        "mixed": raised(lambda: x + torch.ones(3)),
        "mixed product": raised(lambda: torch.ones(2, 2, device="cuda") @ torch.ones(2, 2)),
        "numpy": raised(x.numpy),
        "host numpy": raised(torch.ones(1).numpy),
        "other thread": _in_thread(lambda: [str(x.device), str((x + 1).device), str(torch.ones(1).cuda().device)]),
        "copied": str(torch.empty(3).copy_(x).device),
    }


def _in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def count_memory() -> dict[str, Any]:
    import torch

    torch.cuda.init()
    torch.cuda.empty_cache()
    counts: dict[str, Any] = {"start": torch.cuda.memory_allocated()}
    x = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    counts["held"] = [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()]
    view = x[:10]
    del x
    counts["view"] = torch.cuda.memory_allocated()
    del view
    counts["given"] = [torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()]
    torch.cuda.reset_peak_memory_stats()
    counts["peak"] = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    counts["emptied"] = torch.cuda.memory_reserved()
    one = torch.empty(1, device="cuda")
    other = torch.empty(1, device="cuda")
    del one
    stats = torch.cuda.memory_stats()
    counts["split"] = [stats["inactive_split_bytes.all.current"], stats["requested_bytes.all.current"]]
    del other
    torch.cuda.memory._record_memory_history()
    y = torch.ones(MIB, device="cuda")
    del y
    snapshot = torch.cuda.memory._snapshot()
    counts["trace"] = [[event["action"], event["size"]] for event in snapshot["device_traces"][0]]
    counts["segments"] = [[each["total_size"], each["segment_type"]] for each in snapshot["segments"]]
    return counts


def run_out_of_memory() -> dict[str, Any]:
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(128 * MIB / total)
    held = []
    for _ in range(100):
        told = raised(lambda: held.append(torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")))
        if told != "nothing":
            break
    pieces, stats = len(held), torch.cuda.memory_stats()
    held.clear()
    return {
        "pieces": pieces,
        "told": told,
        "ooms": stats["num_ooms"],
        "after": [torch.cuda.memory_allocated(), raised(lambda: torch.empty(40 * MIB, device="cuda"))[:16]],
        "again": raised(lambda: torch.empty(MIB, dtype=torch.uint8, device="cuda")),
    }


def time_by_events() -> dict[str, Any]:
    import time

    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    unrecorded = raised(lambda: events[0].elapsed_time(events[1]))
    start = time.perf_counter()
    events[0].record()
    time.sleep(0.02)
    events[1].record()
    early = raised(lambda: events[0].elapsed_time(events[1]))
    torch.cuda.synchronize()
    milliseconds = events[0].elapsed_time(events[1])
    host_milliseconds = 1000 * (time.perf_counter() - start)
    untimed = torch.cuda.Event()
    untimed.record()
    untimed.synchronize()
    return {
        "unrecorded": unrecorded,
        "early": early,
        "milliseconds": milliseconds,
        "milliseconds by the host": host_milliseconds,
        "untimed": raised(lambda: events[0].elapsed_time(untimed)),
        "waited for by a value": _waited_for_by_a_value(),
    }


def _waited_for_by_a_value() -> list[bool]:
    import torch

    x, event = torch.ones(3, device="cuda"), torch.cuda.Event()
    event.record()
    before = event.query()
    x.sum().item()
    return [before, event.query()]


def go_backward() -> dict[str, Any]:
    """Where backward runs, what it sees there, and that its gradients are the CPU's."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from peft_gauge._internals.torch import DispatchMode

    seen: dict[str, Any] = {"modes": [], "frames": [], "threads": set()}

    class Watching(DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch._C._current_autograd_node() is not None:
                frame = sys._getframe().f_back
                names = []
                while frame is not None:
                    names.append(frame.f_code.co_name)
                    frame = frame.f_back
                seen["frames"].append(names)
                seen["threads"].add(threading.get_ident())
                seen["modes"].append(str(func))
            return func(*args, **(kwargs or {}))

    def step(device: str) -> tuple[list[Any], Any]:
        layer = torch.nn.Linear(4, 4)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(16.0).view(4, 4))
            layer.bias.zero_()
        layer.to(device)
        x = torch.ones(2, 4, device=device, requires_grad=True)
        hidden = layer(x)
        loss = (hidden * hidden + hidden).bfloat16().float().sum()
        loss.backward()
        return [str(each.grad.device) for each in (*layer.parameters(), x) if each.grad is not None], layer.weight.grad

    with Watching():
        devices, gradient = step("cuda")
    _, expected = step("cpu")

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise ValueError("in the device's thread")

    def fail() -> None:
        Failing.apply(torch.ones(2, device="cuda", requires_grad=True)).sum().backward()

    told = raised(fail)
    x = torch.ones(2, device="cuda", requires_grad=True)
    (by_grad,) = torch.autograd.grad((x * 3).sum(), x)
    checkpointed = checkpoint(lambda y: y * y, x, use_reentrant=True)
    checkpointed.sum().backward()
    return {
        "devices": devices,
        "equal": torch.equal(gradient.cpu(), expected),
        "frames": [names for names in seen["frames"] if names],
        "dispatched": len(seen["modes"]),
        "own thread": threading.get_ident() not in seen["threads"],
        "failing": told,
        "by grad": [str(by_grad.device), by_grad.cpu().tolist()],
        "reentrant": _gradient(x).cpu().tolist(),
        "modes left": torch._C._len_torch_dispatch_stack(),
    }


def _gradient(tensor: Any) -> Any:
    return tensor.grad


def break_the_device() -> dict[str, Any]:
    import torch

    table = torch.zeros(8, 8, device="cuda")
    looked_up = torch.nn.functional.embedding(torch.tensor([8], device="cuda"), table)
    return {
        "shape": list(looked_up.shape),
        "synchronize": raised(torch.cuda.synchronize).partition("\n")[0],
        "later": raised(lambda: table + 1).partition("\n")[0],
        "stats": torch.cuda.memory_allocated() > 0,
    }


def fork_after_use() -> dict[str, Any]:
    import torch

    torch.zeros(1, device="cuda")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        told = f"{torch.cuda.is_initialized()} {raised(lambda: torch.zeros(1, device='cuda').sum().item())}"
        told += " " + raised(torch.cuda.init)
        os.write(writing, told.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return {"child": os.read(reading, 4000).decode()}


def quantize_on_the_card() -> dict[str, Any]:
    import torch

    from peft_gauge.training.quantization import load_bitsandbytes

    bitsandbytes = load_bitsandbytes("cuda")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.to("cuda")
    x = torch.ones(8, 64, device="cuda", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    return {
        "weight": [str(layer.weight.device), str(layer.weight.dtype), layer.weight.numel()],
        "absmax": str(layer.weight.quant_state.absmax.device),
        "result": str(y.device),
        "gradient": str(x.grad.device),
        "available": torch.cuda.is_available(),
    }


def read_the_driver() -> dict[str, Any]:
    import torch

    from peft_gauge.meters.nvml import NvmlMeter

    meter = NvmlMeter()
    readings: list[Any] = [meter.why_unavailable()]
    for work in (lambda: None, lambda: torch.zeros(1, device="cuda"), lambda: None):
        held = work()
        meter.start_phase("x")
        readings.append(dict(meter.end_phase("x")))
    del held
    return {"readings": readings, "state": vars(meter.state())}
