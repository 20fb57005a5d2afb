"""Bottleneck adapters: a small residual MLP after the sub-layers of each decoder block; only the MLPs are trained.

There are two styles. In a Llama they are placed as in the library `adapters` (1.3.0), which `tests/reference` checks:

* houlsby (Houlsby et al. 2019, arXiv:1902.00751; `double_seq_bn`): one adapter on the output of attention (in a hybrid,
  of any token mixer) and one on the output of the feed-forward, each before its residual is added;
* pfeiffer (Pfeiffer et al. 2020, arXiv:2005.00247; `seq_bn`): one adapter per block, after the feed-forward's residual.

The up-projection starts at zero, so a newly adapted model has the outputs of its base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.files import write_whole

if TYPE_CHECKING:
    import torch
    from torch import nn

Style = Literal["houlsby", "pfeiffer"]
NONLINEARITIES = ("gelu", "gelu_new", "leakyrelu", "relu", "sigmoid", "silu", "swish", "tanh")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class BottleneckConfig:
    """Settings of bottleneck adapters. Raises `GaugeError` for a value out of range."""

    style: Style = "houlsby"
    """The placement of adapters, which also fixes their number per block."""
    reduction_factor: float = 16
    """Hidden size over bottleneck width, at least 1; the width is rounded down, but never below 1."""
    nonlinearity: str = "swish"
    """A name from `adapters`, whose defaults are swish for houlsby and relu for pfeiffer."""

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise unknown("bottleneck style", str(self.style), get_args(Style))
        factor = self.reduction_factor
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not is_number or not math.isfinite(factor) or factor < 1:
            raise GaugeError(f"reduction_factor must be a number of at least 1, got {factor!r}")
        if self.nonlinearity not in NONLINEARITIES:
            raise unknown("nonlinearity", str(self.nonlinearity), NONLINEARITIES)

    def bottleneck(self, hidden: int) -> int:
        """The width m of the bottleneck for hidden size ``hidden``."""
        return max(1, int(hidden // self.reduction_factor))


def attach_(model: nn.Module, config: BottleneckConfig, *, dtype: torch.dtype | None = None, seed: int = 0) -> None:
    """Freeze ``model`` and add trainable adapters to it in place. Quantize the base before, not after.

    Adapters are on the device of the module they adapt, in ``dtype`` (default: float32, PEFT's default for 16-bit and
    4-bit bases too). The same ``seed`` draws the same weights on every device. Raises `GaugeError` if the model has
    adapters already, or if its architecture lacks the sub-layers that the style needs.
    """
    import torch

    from peft_gauge.training.bottleneck_layers import BottleneckAdapter, adapt_, adapted_modules, adapters

    if any(adapters(model)):
        raise GaugeError("the model has bottleneck adapters already; build a new base model")
    dtype = dtype or torch.float32
    if not dtype.is_floating_point:
        raise GaugeError(f"adapters cannot be trained in {dtype}; use a floating-point dtype")
    modules = adapted_modules(model, config.style)
    hidden = _hidden_size(model)
    model.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(seed)
    for module in modules.values():
        adapter = BottleneckAdapter(
            hidden,
            config.bottleneck(hidden),
            config.nonlinearity,
            device=next(module.parameters()).device,
            dtype=dtype,
            generator=generator,
        )
        adapt_(module, adapter)
    model.bottleneck_config = config  # type: ignore[assignment]


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' weights by full name, sharing memory with ``model``; empty without adapters."""
    from peft_gauge.training.bottleneck_layers import adapters

    return {
        f"{name}.{key}": parameter.detach()
        for name, adapter in adapters(model)
        for key, parameter in adapter.named_parameters()
    }


def save(model: nn.Module, folder: str | Path) -> None:
    """Write only the adapters into ``folder``, as ``adapter_config.json`` and ``adapter_model.safetensors``.

    Each file is written whole or not at all. Raises `GaugeError` if the model has no adapters, or on a write error.
    """
    from safetensors.torch import save as to_bytes

    state = adapter_state(model)
    if not state:
        raise GaugeError("the model has no bottleneck adapters to save")
    if any(tensor.is_meta for tensor in state.values()):
        raise GaugeError("adapters on the meta device have no weights to save; build the model on cpu or cuda")
    described = {"adapter_type": "bottleneck", **asdict(_config_of(model)), **_sizes(model)}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS_FILE, to_bytes({k: v.contiguous() for k, v in state.items()}, {"format": "pt"}))
        write_whole(folder / CONFIG_FILE, (json.dumps(described, indent=2) + "\n").encode())
    except OSError as error:
        raise GaugeError(f"cannot save adapters in {folder}: {one_line(error)}") from error


def load(model: nn.Module, folder: str | Path) -> None:
    """Load the adapters saved in ``folder`` into ``model``; if it has none, attach them and freeze the base.

    Raises `GaugeError` if a file is missing, is damaged or does not fit the model, which then stays unchanged.
    """
    import torch

    folder = Path(folder)
    config = read_config(folder / CONFIG_FILE, _sizes(model))
    saved = _read_weights(folder / WEIGHTS_FILE)
    present = adapter_state(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise GaugeError("adapters cannot be loaded onto the meta device; build the model on cpu or cuda")
    if present and _config_of(model) != config:
        raise GaugeError(f"{folder} has {config}, but the model has {_config_of(model)}; load into a new base model")
    _check_fit(folder / WEIGHTS_FILE, saved, _expected_shapes(model, config))
    if not present:
        attach_(model, config, dtype=next(iter(saved.values())).dtype)
    for name, tensor in adapter_state(model).items():
        with torch.no_grad():
            tensor.copy_(saved[name])


def _config_of(model: nn.Module) -> BottleneckConfig:
    config = model.bottleneck_config
    assert isinstance(config, BottleneckConfig), "attach_ sets the config with the adapters"
    return config


def _hidden_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(text_config, "hidden_size", None)
    if not isinstance(hidden, int):
        raise GaugeError(f"the config of {type(model).__name__} has no hidden_size, which bottleneck adapters need")
    return hidden


def _sizes(model: nn.Module) -> dict[str, int]:
    """The sizes of the base model that adapters depend on."""
    from peft_gauge.training.targets import decoder_blocks

    return {"hidden_size": _hidden_size(model), "num_hidden_layers": len(decoder_blocks(model))}


def _expected_shapes(model: nn.Module, config: BottleneckConfig) -> dict[str, tuple[int, ...]]:
    from peft_gauge.training.bottleneck_layers import ADAPTER_NAME, adapted_modules

    d = _hidden_size(model)
    m = config.bottleneck(d)
    shapes: dict[str, tuple[int, ...]] = {
        "down.weight": (m, d),
        "down.bias": (m,),
        "up.weight": (d, m),
        "up.bias": (d,),
    }
    modules = adapted_modules(model, config.style)
    return {f"{name}.{ADAPTER_NAME}.{key}": shape for name in modules for key, shape in shapes.items()}


def _check_fit(path: Path, saved: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    faults = [f"{name} is missing" for name in expected if name not in saved]
    faults += [f"{name} is not in this model" for name in saved if name not in expected]
    faults += [
        f"{name} has shape {tuple(saved[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in saved and tuple(saved[name].shape) != shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise GaugeError(f"{path} does not fit the model: {faults[0]}{more}")


def read_config(path: Path, sizes: Mapping[str, int] | None = None) -> BottleneckConfig:
    """The config in the ``adapter_config.json`` at ``path``, checked against ``sizes`` of the base model if given."""
    try:
        described = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise GaugeError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(described, dict) or described.get("adapter_type") != "bottleneck":
        raise GaugeError(f"{path} does not describe bottleneck adapters: adapter_type must be 'bottleneck'")
    for key, size in (sizes or {}).items():
        if described.get(key) != size:
            raise GaugeError(f"{path} was saved from a model with {key} {described.get(key)}; this one has {size}")
    try:
        return BottleneckConfig(
            style=described["style"],
            reduction_factor=described["reduction_factor"],
            nonlinearity=described["nonlinearity"],
        )
    except KeyError as error:
        raise GaugeError(f"{path} has no entry {error}") from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise GaugeError(f"cannot read {path}: {one_line(error)}") from error
