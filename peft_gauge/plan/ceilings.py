"""Memory ceilings: the most memory that each measured training step may use, in a file reviewed like code.

A ceiling is the result of `peft_gauge.plan` with a margin for the quantities that a plan does not know. The file,
``fixtures/ceilings.toml``, has one line per case, so that any effect of a library's update shows as a diff. Reading it
imports none of the libraries.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge import paths
from peft_gauge.errors import GaugeError
from peft_gauge.files import write_whole
from peft_gauge.memory.overheads import CUBLAS_WORKSPACE_HOPPER_BYTES, CUBLAS_WORKSPACES, CUBLASLT_WORKSPACE_BYTES
from peft_gauge.training.loops import step_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft_gauge.plan.record import Plan
    from peft_gauge.training.cases import Case

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
"""The libraries whose versions affect a plan."""


@dataclass(frozen=True, order=True)
class CeilingKey:
    """The case of a ceiling. Everything that is not named here has the default of its loop."""

    model: str
    method: str
    device: str
    dtype: str
    batch: int
    seq: int
    loop: str = "plain"
    mixed_precision: str = "no"


OFTEN = {"loop": "plain", "mixed_precision": "no"}
"""Fields of a key that a line leaves out if they have these values."""


@dataclass(frozen=True)
class Ceiling:
    """The most memory that a step may use, in bytes.

    ``allocated_bytes``: tensors and library workspaces (``torch.cuda.max_memory_allocated``); ``reserved_bytes``: the
    caching allocator's segments; ``device_bytes``: the driver's number for the process, CUDA context included.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int


@dataclass(frozen=True)
class Margins:
    """The margins added to a plan. Percentages are integers, so that a ceiling can be computed by hand to the byte."""

    allocated_percent: int = 3
    """A plan counts tensors exactly; this allows for another attention kernel, or a temporary in a new release. A
    method that starts to keep one more copy of its activations exceeds it."""
    reserved_percent: int = 12
    """Segments depend on the order of all allocations since the process began; a plan replays only steps."""
    device_percent: int = 15
    """The CUDA context is an estimate and differs by GPU, driver and loaded kernels."""
    workspace_bytes: int = CUBLAS_WORKSPACES * CUBLAS_WORKSPACE_HOPPER_BYTES + CUBLASLT_WORKSPACE_BYTES
    """cuBLAS's two workspaces and cuBLASLt's at their largest (Hopper), since a ceiling is for any GPU."""

    def ceiling(self, plan: Plan) -> Ceiling:
        """The ceiling for ``plan``, with the largest workspaces in place of the plan's own, which may be smaller."""
        largest = self.workspace_bytes - plan.device.cublas_workspace_bytes - plan.device.cublaslt_workspace_bytes
        return Ceiling(
            allocated_bytes=_raised(plan.peak_bytes, self.allocated_percent) + self.workspace_bytes,
            reserved_bytes=_raised(plan.reserved_bytes_estimate + largest, self.reserved_percent),
            device_bytes=_raised(plan.device_bytes_estimate + largest, self.device_percent),
        )


def _raised(size: int, percent: int) -> int:
    return -(-size * (100 + percent) // 100)  # rounded up


@dataclass(frozen=True)
class CeilingTable:
    """The content of the file: ceilings by case, and the library versions of their plans."""

    ceilings: Mapping[CeilingKey, Ceiling]
    margins: Margins
    versions: Mapping[str, str]


def default_path() -> Path:
    """The path of the project's ceilings, also before they are first written."""
    return paths.fixture("models").parent / "ceilings.toml"


def ceiling_for(key: CeilingKey, *, path: Path | None = None) -> Ceiling | None:
    """The ceiling of this case, or ``None`` if the table has none; raises `GaugeError` for an unusable file."""
    return read(path or default_path()).ceilings.get(key)


def key_of(case: Case) -> CeilingKey | None:
    """The key of ``case`` in the table; ``None`` if it has settings that the table's cases do not have."""
    settings = case.settings
    batch, seq, precision = settings.batch, settings.seq, settings.mixed_precision
    default = step_settings(case.loop, {"batch": batch, "seq": seq, "mixed_precision": precision}, {})
    if (settings, case.trainer_arguments) != default or case.attention is not None:
        return None
    names = case.model.name, case.method.name, case.device, case.dtype
    return CeilingKey(*names, batch, seq, case.loop, precision)


@cache
def read(path: Path) -> CeilingTable:
    """The table in the file at ``path``; raises `GaugeError` if it is missing, not TOML, or invalid."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        margins = Margins(**_whole(content["margins"], Margins))
        versions = {name: str(content["planned_with"][name]) for name in LIBRARIES}
        ceilings: dict[CeilingKey, Ceiling] = {}
        for row in content["ceilings"]:
            key, ceiling = _from_row(row)
            if key in ceilings:
                raise ValueError(f"{shown(key)} occurs twice")
            ceilings[key] = ceiling
    except (OSError, ValueError, KeyError, TypeError) as error:  # tomllib's and Unicode errors are ValueErrors
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise GaugeError(f"{path} is not a table of ceilings: {reason}; run: peft-gauge ceilings --write") from error
    return CeilingTable(ceilings, margins, versions)


def _from_row(row: Mapping[str, Any]) -> tuple[CeilingKey, Ceiling]:
    names = [field.name for kind in (CeilingKey, Ceiling) for field in fields(kind)]
    row = {**OFTEN, **row}
    if set(row) != set(names):
        raise ValueError(f"a ceiling has the fields {', '.join(names)}, not {', '.join(row)}")
    texts = ("model", "method", "device", "dtype", *OFTEN)
    if not all(isinstance(row[name], str) for name in texts):
        raise ValueError(f"{', '.join(texts)} of a ceiling must be strings")
    numbers = _whole({name: value for name, value in row.items() if name not in texts})
    key = CeilingKey(**{field.name: row[field.name] for field in fields(CeilingKey)})
    ceiling = Ceiling(**{field.name: numbers[field.name] for field in fields(Ceiling)})
    if not ceiling.allocated_bytes <= ceiling.reserved_bytes <= ceiling.device_bytes:
        raise ValueError(f"{shown(key)}: not allocated ≤ reserved ≤ device")
    return key, ceiling


def _whole(values: Mapping[str, Any], kind: type | None = None) -> dict[str, int]:
    """``values``, checked to be positive integers and, with ``kind``, exactly that dataclass's fields."""
    if kind is not None and set(values) != {field.name for field in fields(kind)}:
        raise ValueError(f"{kind.__name__.lower()} are {', '.join(field.name for field in fields(kind))}")
    for name, value in values.items():
        if type(value) is not int or value < 1:  # a bool is an int to isinstance
            raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
    return dict(values)


def shown(key: CeilingKey) -> str:
    """The case as messages name it."""
    shape = f"{key.batch}×{key.seq}"
    others = [getattr(key, name) for name, value in OFTEN.items() if getattr(key, name) != value]
    return ", ".join([f"{key.method} on {key.model}", key.device, key.dtype, shape, *others])


# --- writing


HEADER = """\
# The most memory that a training step may take, by case, in bytes; a measured benchmark fails above it.
# Generated by `peft-gauge ceilings --write`: do not edit, but review the diff. Without --write the command prints the
# changes, and exits with 1 if this file is out of date.
#
# A ceiling is the planned value with a margin, rounded up:
#   allocated_bytes  the step's peak, + {allocated_percent} %, and the workspaces of cuBLAS and cuBLASLt on Hopper,
#                    which count as allocated. Tight: it detects a method that needs more than before.
#   reserved_bytes   the allocator's segments with such workspaces, + {reserved_percent} % for fragmentation, which
#                    depends on all earlier allocations of the process.
#   device_bytes     those segments and an estimated CUDA context, + {device_percent} % for differences of GPU,
#                    driver and loaded kernels. Loose: it shows whether a GPU is large enough.
# nvidia-smi has shown 1.06 to 1.48 times the peak allocated, most for QLoRA; below, device_bytes is {least:.2f} to
# {most:.2f} times allocated_bytes. Plans replay steps, not loading: empty the allocator's cache in between.
# Settings that a line does not name are the defaults: this suite's own step without autocast, AdamW, one micro-batch,
# no gradient checkpointing, no padding; with loop = "trainer" those of transformers' TrainingArguments.
"""


def render(table: CeilingTable) -> str:
    """``table``, of at least one case, as TOML: the same text for the same table, one line per case, sorted."""
    ratios = [each.device_bytes / each.allocated_bytes for each in table.ceilings.values()]
    margins = asdict(table.margins)
    versions = {name: table.versions[name] for name in LIBRARIES}
    rows = [f"    {shown_row(key, table.ceilings[key])}," for key in sorted(table.ceilings)]
    return "\n".join(
        [
            HEADER.format(**margins, least=min(ratios), most=max(ratios)),
            f"planned_with = {_inline(versions)}",
            f"margins = {_inline(margins)}",
            "",
            "ceilings = [",
            *rows,
            "]",
            "",
        ]
    )


def shown_row(key: CeilingKey, ceiling: Ceiling) -> str:
    """The line of one case in the file."""
    named = {name: value for name, value in asdict(key).items() if OFTEN.get(name) != value}
    return _inline(named | asdict(ceiling))


def _inline(values: Mapping[str, str | int]) -> str:
    return "{ " + ", ".join(f"{name} = {_toml(value)}" for name, value in values.items()) + " }"


def _toml(value: str | int) -> str:
    if isinstance(value, int):
        return f"{value:_}"
    # A JSON string is a TOML string, except DEL, which TOML requires to be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def write(path: Path, table: CeilingTable) -> None:
    """Replace the file at ``path`` atomically; raises `GaugeError` if it cannot be written."""
    text = render(table)
    try:
        write_whole(path, text)
    except OSError as error:
        raise GaugeError(f"cannot write {path}: {error.strerror or error}; choose another file with --file") from error
    read.cache_clear()


def changes(old: Mapping[CeilingKey, Ceiling], new: Mapping[CeilingKey, Ceiling]) -> list[str]:
    """The changes from ``old`` to ``new``, as lines removed (-) and added (+), case by case."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            lines += [f"{sign} {shown_row(key, side[key])}" for sign, side in (("-", old), ("+", new)) if key in side]
    return lines
