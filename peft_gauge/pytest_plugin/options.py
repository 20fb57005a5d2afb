"""The suite's own options on pytest's command line, and the record of what a run was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_gauge.history.schema import Selection
from peft_gauge.training import models

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

DEVICES = ("cpu", "cuda")


def add_options(parser: pytest.Parser) -> None:
    """The suite's own options."""
    group = parser.getgroup("peft-gauge", "peft-gauge: what is measured, and where the result goes")
    add = group.addoption
    add(
        "--model",
        help="a record's name, a folder, a GGUF file or a hub id (by default one a device); a path as --model=PATH",
    )
    add(
        "--method",
        action="append",
        metavar="NAME",
        help="a method or variant; may be given several times (default: seven)",
    )
    add(
        "--adapter",
        action="append",
        metavar="FILE",
        help="an adapter_config.json or its folder, as a further method; as --adapter=FILE",
    )
    add("--device", help=f"{' or '.join(DEVICES)} (default: cuda where there is one)")
    add("--dtype", help=f"of the base weights: {', '.join(models.DTYPES)} (default: by device)")
    add(
        "--mixed-precision",
        default="no",
        help="no, bf16 or fp16: run forward under autocast, with loss scaling for fp16 (default: no)",
    )
    add(
        "--attention",
        help=f"{', '.join(models.ATTENTIONS)} (default: sdpa where the architecture has it, else eager)",
    )
    add(
        "--weights",
        help="real, random, or random-gpu, which the GPU draws: a 7B in seconds, other values than random "
        "(default: real where they are at hand)",
    )
    add("--batch", type=int, help="rows a step (default: 1 on cpu, 4 on cuda)")
    add("--seq", type=int, help="tokens a row (default: 64 on cpu, 768 on cuda)")
    add(
        "--dataset",
        metavar="SOURCE",
        help="prompt/response or text examples for the slow quality sweeps: a file, a saved folder or a hub id "
        "(default: generated)",
    )
    add("--seed", type=int, default=0, help="draws random weights, adapters and token ids (default: 0)")
    add("--rounds", type=int, help="timed steps after warm-up (default: until their noise is low, or settled)")
    add(
        "--processes",
        type=int,
        default=1,
        help="processes that time each case; several show how far they differ, which compare needs (default: 1)",
    )
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="take cases in the order of their worth and begin none that would not end so many seconds after the start "
        "of pytest, by its own estimate; --resume goes on with the rest",
    )
    add(
        "--time-limit",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="after which the process of a measured case is killed, its outcome timed-out (default: 900)",
    )
    add("--results", default="results", metavar="DIR", help="where runs are saved (default: results); as --results=DIR")
    add("--no-save", action="store_true", help="do not save this run")
    add(
        "--traces",
        metavar="DIR",
        help="where the allocator's log of one step of each case on CUDA goes, which peft-gauge trace reads "
        "(default: traces beside the saved run); as --traces=DIR",
    )
    add(
        "--compare",
        nargs="?",
        const="",
        metavar="FILE",
        help="compare with a saved run, by default this machine's last one; fails where something got worse",
    )
    add(
        "--resume",
        action="store_true",
        help="run only what did not pass in the last saved run of this machine, these versions and these options",
    )


def run_options(config: pytest.Config) -> dict[str, Any]:
    """The options that shape a run, for its record."""
    names = (
        "model",
        "method",
        "adapter",
        "device",
        "dtype",
        "mixed_precision",
        "attention",
        "weights",
        "batch",
        "seq",
        "seed",
        "rounds",
        "processes",
        "dataset",
    )
    return {name: config.getoption(name) for name in names}


def selection(config: pytest.Config, deselected: Iterable[str] | None) -> Selection:
    """What the command line asked for, for the run's record; ``deselected``: ids, ``None`` where nobody noted them."""

    def from_root(arg: str) -> str:
        path, mark, name = arg.partition("::")
        there = (config.invocation_params.dir / path).resolve()
        inside = there.is_relative_to(config.rootpath)
        return (there.relative_to(config.rootpath).as_posix() if inside else there.as_posix()) + mark + name

    option = config.getoption
    noted = None if deselected is None else frozenset(deselected)
    return Selection(tuple(map(from_root, config.args)), option("markexpr"), option("keyword"), noted)
