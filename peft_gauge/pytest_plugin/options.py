"""The suite's own options on pytest's command line, and their record in the saved run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peft_gauge import config_file
from peft_gauge.config_file import Option
from peft_gauge.errors import GaugeError
from peft_gauge.history.schema import Selection, Shards
from peft_gauge.training import models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import pytest

DEVICES = ("cpu", "cuda")

GROUPS: Mapping[str, Sequence[str]] = {
    "measured cases": ("--model", "--weights", "--method", "--adapter", "--device", "--seed"),
    "training step": (
        *("--batch", "--seq", "--dtype", "--loop", "--set", "--mixed-precision", "--float32-outputs", "--attention"),
    ),
    "several GPUs (-m multigpu)": ("--gpus", "--strategy", "--replicate", "--rank-port"),
    "measurement": ("--rounds", "--processes", "--budget", "--time-limit", "--dataset", "--no-plan-cache"),
    "results": ("--results", "--no-save", "--resume", "--compare", "--shard", "--traces", "--details"),
}
"""The headings of the suite's options in ``pytest --help``, with their options in order."""


def file_options() -> dict[str, Option]:
    """The suite's options that the user's file can set, by name with dashes."""
    added: list[tuple[str, dict[str, Any]]] = []
    _add_options(lambda name, **attributes: added.append((name, attributes)))
    return {name.removeprefix("--"): _file_option(name, attributes) for name, attributes in added}


def _file_option(name: str, attributes: dict[str, Any]) -> Option:
    kind = attributes.get("type", bool if attributes.get("action") == "store_true" else str)
    is_path = name in ("--results", "--traces", "--adapter")
    dest = attributes.get("dest", name.removeprefix("--").replace("-", "_"))
    return Option(dest, Path if is_path else kind, attributes.get("action") == "append")


def add_options(parser: pytest.Parser, defaults: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Add the suite's own options. ``defaults``: from the user's file, by dest; those of repeatable options have to be
    filled in after parsing (`fill_in`), since argparse would add to them."""
    groups = {
        name: parser.getgroup(f"peft-gauge {title}", f"peft-gauge: {title}")
        for title, names in GROUPS.items()
        for name in names
    }

    def add(name: str, **attributes: Any) -> None:
        option = _file_option(name, attributes)
        if option.name in defaults and not option.many:
            attributes["default"] = defaults[option.name]
        groups[name].addoption(name, **attributes)

    _add_options(add)


def fill_in(config: pytest.Config, defaults: Mapping[str, Any]) -> None:
    """Set the repeatable options that the command line does not name to their ``defaults``."""
    for option in file_options().values():
        if option.many and option.name in defaults and getattr(config.option, option.name) is None:
            setattr(config.option, option.name, defaults[option.name])


@dataclass(frozen=True)
class FileDefaults:
    """The defaults that the user's file gives, by dest, and why it is ``invalid``, to be raised once pytest can report
    it."""

    values: Mapping[str, Any] = field(default_factory=dict)
    invalid: GaugeError | None = None

    @classmethod
    def read(cls) -> FileDefaults:
        """The file is read once per session."""
        try:
            found = config_file.find()
            return cls({} if found is None else found.values(config_file.PYTEST, file_options()))
        except GaugeError as error:
            return cls(invalid=error)


def _add_options(add: Callable[..., object]) -> None:
    add(
        "--model",
        help="a record's name, a folder, a GGUF file or a Hub id (default: by device); for a path: --model=PATH",
    )
    add(
        "--method",
        action="append",
        metavar="NAME",
        help="methods or variants, comma-separated or repeated (default: seven methods)",
    )
    add(
        "--adapter",
        action="append",
        metavar="FILE",
        help="add the methods of adapter_config.json files or their folders, comma-separated or repeated; write "
        "--adapter=FILE",
    )
    add("--device", help=f"{' or '.join(DEVICES)} (default: cuda if available)")
    add(
        "--dtype",
        help=f"data type of the base weights: {', '.join(models.DTYPES)} (default: by device; float32 for --loop sft)",
    )
    add(
        "--loop",
        default="plain",
        help="plain: this suite's step; trainer: transformers.Trainer; sft: trl.SFTTrainer (default: plain)",
    )
    add(
        "--set",
        action="append",
        dest="changes",
        metavar="KEY=VALUE",
        help="an argument of the trainer, such as gradient_checkpointing=true; repeatable; needs --loop",
    )
    add(
        "--mixed-precision",
        help="no, bf16 or fp16: run forward under autocast, with loss scaling for fp16 (default: no, or the trainer's)",
    )
    add(
        "--float32-outputs",
        action="store_true",
        help="copy 16-bit outputs of forward to float32, as accelerate does (a trainer does so itself)",
    )
    add(
        "--attention",
        help=f"{', '.join(models.ATTENTIONS)} (default: sdpa if the architecture supports it, else eager)",
    )
    add(
        "--weights",
        help="real, random, or random-gpu: drawn on the GPU, a 7B in seconds, with other values than random "
        "(default: real if available locally)",
    )
    add("--batch", type=int, help="micro-batch size (default: 1 on cpu, 4 on cuda)")
    add("--seq", type=int, help="sequence length in tokens (default: 64 on cpu, 768 on cuda)")
    add(
        "--gpus",
        type=int,
        help="GPUs that share each step of -m multigpu (default: all; with --device cpu two processes)",
    )
    add(
        "--rank-port",
        type=int,
        default=0,
        metavar="PORT",
        help="port at which the ranks of -m multigpu meet (default: 0, a free one)",
    )
    add("--strategy", default="fsdp2", help="fsdp2, ddp, zero1, zero2 or zero3: how they share it (default: fsdp2)")
    add(
        "--replicate",
        type=int,
        default=1,
        metavar="N",
        help="groups of GPUs that each hold all shards, for fsdp2: hybrid sharding, HSDP; needs --gpus (default: 1)",
    )
    add(
        "--dataset",
        metavar="SOURCE",
        help="prompt/response or text examples for the slow sweeps over texts: a file, a saved folder or a Hub id "
        "(default: none, and they skip)",
    )
    add("--seed", type=int, default=0, help="seed of random weights, adapters and token ids (default: 0)")
    add(
        "--rounds",
        type=int,
        help="timed steps after warm-up (default: adaptive; stops when relative noise is low or stable)",
    )
    add(
        "--processes",
        type=int,
        default=1,
        help="processes that time each case; use at least 2 to estimate between-process variance (default: 1)",
    )
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="run cases by priority, and start none that would, by its own estimate, end later than SECONDS after the "
        "start of pytest; continue with --resume",
    )
    add(
        "--time-limit",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="kill the process of a measured case after SECONDS, with the outcome timed-out (default: 900)",
    )
    add(
        "--shard",
        metavar="I/N",
        help="run only the I-th of N parts, for several machines that share one run; peft-gauge merge joins the saved "
        "runs (the tests of a case stay together)",
    )
    add(
        "--results",
        default="results",
        metavar="DIR",
        help="save runs in DIR (default: results), or at an address such as s3://bucket/runs; write --results=DIR",
    )
    add("--no-plan-cache", action="store_true", help="plan every step, also those that an earlier run planned")
    add("--no-save", action="store_true", help="do not save this run")
    add(
        "--traces",
        metavar="DIR",
        help="save the allocator's log of one step of each CUDA case in DIR, for peft-gauge trace (default: traces "
        "next to the saved run); write --traces=DIR",
    )
    add(
        "--compare",
        nargs="?",
        const="",
        metavar="FILE",
        help="compare with a saved run, by default this machine's last one; fail on a regression",
    )
    add("--details", action="store_true", help="show all tables, each skip and pytest-benchmark's table at the end")
    add(
        "--resume",
        action="store_true",
        help="run only the cases that did not pass in the last saved run with this machine, versions and options",
    )


def run_options(config: pytest.Config) -> dict[str, Any]:
    """The options that affect the results of a run, for its record."""
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
    found = {name: config.getoption(name) for name in names}
    if config.getoption("gpus") is not None or config.getoption("strategy") != "fsdp2":
        found |= {"gpus": config.getoption("gpus"), "strategy": config.getoption("strategy")}
    if config.getoption("replicate") != 1:
        found["replicate"] = config.getoption("replicate")
    if config.getoption("shard") is not None:
        found["shard"] = config.getoption("shard")
    if config.getoption("float32_outputs"):  # runs without it do not record it, as earlier ones
        found["float32_outputs"] = True
    if config.getoption("loop") == "plain":  # as earlier runs, which knew no other, recorded it
        return {**found, "mixed_precision": found["mixed_precision"] or "no"}
    return {**found, "loop": config.getoption("loop"), "set": config.getoption("changes") or []}


def selection(config: pytest.Config, deselected: Iterable[str] | None, shards: Shards | None = None) -> Selection:
    """The selection on the command line, for the run's record; ``deselected``: ids, ``None`` if they are unknown;
    ``shards``: the shard that the run is."""

    def from_root(arg: str) -> str:
        path, mark, name = arg.partition("::")
        there = (config.invocation_params.dir / path).resolve()
        inside = there.is_relative_to(config.rootpath)
        return (there.relative_to(config.rootpath).as_posix() if inside else there.as_posix()) + mark + name

    option = config.getoption
    noted = None if deselected is None else frozenset(deselected)
    return Selection(tuple(map(from_root, config.args)), option("markexpr"), option("keyword"), noted, shards)
