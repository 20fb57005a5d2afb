"""A base model with several adapters in memory.

`Server.switch` activates one adapter; a mixed batch names an adapter for each row. Only LoRA's tuners read these names;
others ignore them silently (PEFT 0.18 to 0.21), so no other method is served here.

Shapes: token ids (rows, seq), logits (rows, seq, vocabulary).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_gauge import counting
from peft_gauge.errors import GaugeError, one_line, unknown
from peft_gauge.training import methods

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_gauge.training.methods import Method

FIRST = "default"
"""PEFT's name for the adapter that a model is created with."""

BASE = "__base__"
"""PEFT's name, in a mixed batch, for a row without adapter."""

DRAWN_SIZE = 0.02
"""Standard deviation of a drawn adapter's weights, about that of LoRA's initial A; B has the same instead of zero."""


def check_served(method: Method) -> None:
    """Raise `GaugeError` for a method whose adapters cannot share a base and a batch."""
    if method.peft_config.get("peft_type") != "LORA":
        raise GaugeError(f"PEFT cannot mix adapters of {method.name} in one batch; use a LoRA method")


class Server:
    """One base and its adapters, by name, ready for inference.

    The first adapter, `FIRST`, belongs to ``method`` and is drawn from ``seed``. ``base`` is modified: quantized if the
    method requires it, and moved to ``device``. Raises `GaugeError` for a method that `check_served` refuses.
    """

    def __init__(self, base: PreTrainedModel, method: Method, *, seed: int = 0, device: str = "cpu") -> None:
        check_served(method)
        self.method = method
        self.device = device
        base = methods.prepare_base(base, method, device=device)
        if method.quantization is not None:
            with torch.no_grad():  # on a CPU, bitsandbytes repacks a weight at its first use
                base.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
        self.base_bytes = stored_bytes(base)
        prepared = replace(method, quantization=None, prepare_kbit=False)
        self.model: Any = methods.attach(base, prepared, seed=seed).to(device).eval()
        self.adapter_dtype = next(each.dtype for each in self.model.parameters() if each.requires_grad)
        self.merged: str | None = None
        self._draw(FIRST, seed)

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they were added."""
        return list(self.model.peft_config)

    @property
    def adapters_bytes(self) -> int:
        """Bytes of the tensors that all adapters together add to the base."""
        return stored_bytes(self.model) - self.base_bytes

    def add(self, name: str, seed: int) -> None:
        """Add an adapter with the first one's configuration and weights drawn from ``seed``."""
        self._check_new(name)
        config = copy.deepcopy(self.model.peft_config[FIRST])
        with _refusing(f"adapter {name!r} cannot be added"):
            self.model.add_adapter(name, config)
        self.model.eval()  # PEFT creates the new adapter's dropout in training mode, whatever the model's mode
        self._draw(name, seed)

    def load(self, folder: Path, name: str) -> None:
        """Add an adapter from a ``folder`` written by `save` or PEFT.

        Raises `GaugeError` if it contains none, or one for another base model; the server is then unchanged.
        """
        self._check_new(name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / file).is_file():  # PEFT would look for it on the Hub
                raise GaugeError(f"no adapter in {folder}: {file} is missing")
        try:
            with _refusing(f"the adapter in {folder} does not fit this base model"):
                keys = self.model.load_adapter(
                    str(folder),
                    name,
                    torch_device=self.device,
                    autocast_adapter_dtype=self.method.autocast_adapter_dtype,
                )
                unfitting = [*keys.missing_keys, *keys.unexpected_keys]
                if unfitting:  # PEFT ignores them silently
                    raise ValueError(f"{len(unfitting)} tensors have no counterpart, first {unfitting[0]}")
        except GaugeError:
            if name in self.names:
                self.model.delete_adapter(name)
            raise

    def save(self, name: str, folder: Path) -> Path:
        """Save the adapter called ``name`` as PEFT does; returns its folder, at or below ``folder``."""
        self._check_known(name)
        self.model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        return folder if name == FIRST else folder / name

    def delete(self, name: str) -> None:
        """Delete the adapter called ``name``; raises `GaugeError` for the active one."""
        self._check_known(name)
        if name in self.model.active_adapters:
            raise GaugeError(f"the adapter {name!r} is active; switch to another one before deleting it")
        self.model.delete_adapter(name)

    def switch(self, name: str) -> None:
        """Activate the adapter called ``name``."""
        self._check_known(name)
        self._check_unmerged()
        self.model.set_adapter(name)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits of ``ids`` with the active adapter."""
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def base_logits(self, ids: Tensor) -> Tensor:
        """Logits of ``ids`` without adapters."""
        self._check_unmerged()
        with self.model.disable_adapter():
            return self.logits(ids)

    def mixed_logits(self, ids: Tensor, names: Sequence[str]) -> Tensor:
        """Logits of ``ids`` in one batch, each row with its adapter in ``names``, or without one (`BASE`)."""
        self._check_unmerged()
        for name in names:
            if name != BASE:
                self._check_known(name)
        if len(names) != len(ids):
            raise GaugeError(f"{len(ids)} rows need {len(ids)} adapter names, got {len(names)}")
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=ids, use_cache=False, adapter_names=list(names)).logits
        return logits

    def merge(self) -> None:
        """Merge the active adapter into the base weights."""
        self._check_unmerged()
        with warnings.catch_warnings():
            # The loss by merging into 4 bit is measured here.
            warnings.filterwarnings("ignore", "Merge lora module to 4-bit linear", UserWarning)
            warnings.filterwarnings("ignore", "Unmerge lora module to 4-bit linear", UserWarning)
            self.model.merge_adapter()
        self.merged = self.model.active_adapter

    def unmerge(self) -> None:
        """Subtract the merged adapter from the base weights."""
        if self.merged is None:
            raise GaugeError("no adapter is merged; merge one first")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unmerge lora module to 4-bit linear", UserWarning)
            self.model.unmerge_adapter()
        self.merged = None

    def turn_off(self) -> None:
        """Disable all adapters until `turn_on`; the base is then as fast as without them."""
        self._check_unmerged()
        self.model.base_model.disable_adapter_layers()

    def turn_on(self) -> None:
        """Enable the adapters again."""
        self.model.base_model.enable_adapter_layers()

    def layers(self) -> dict[str, Any]:
        """PEFT's LoRA layers by module name."""
        from peft.tuners.lora import LoraLayer

        return {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}

    def _draw(self, name: str, seed: int) -> None:
        """Fill the adapter's tensors, in the first one's dtype: the dtype of an added one depends on PEFT's release."""
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in self.model.named_parameters():
            if name in path.split("."):
                drawn = torch.randn(parameter.shape, generator=generator) * DRAWN_SIZE
                parameter.data = drawn.to(parameter.device, self.adapter_dtype)

    def _check_known(self, name: str) -> None:
        if name not in self.model.peft_config:
            raise unknown("adapter", name, self.names)

    def _check_new(self, name: str) -> None:
        self._check_unmerged()
        if name in self.model.peft_config:
            raise GaugeError(f"there is an adapter {name!r} already; choose another name")
        if name == BASE or not name or "." in name:
            raise GaugeError(f"{name!r} is not a valid adapter name: empty, with a dot, or PEFT's name for the base")

    def _check_unmerged(self) -> None:
        if self.merged is not None:
            raise GaugeError(f"the adapter {self.merged!r} is merged into the base; unmerge it first")


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PEFT, safetensors and torch raise exceptions of their own
        raise GaugeError(f"{what}: {one_line(error, 240)}") from error


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, quantization constants and buffers of ``model``."""
    counted = counting.count(model)
    return counted.weight_bytes + counted.buffer_bytes


def grow(server: Server, number: int, seed: int = 0) -> None:
    """Add adapters, each with its own seed, until there are ``number``."""
    for index in range(len(server.names), number):
        server.add(f"task-{index}", seed + index)


def token_ids(server: Server, rows: int, seq: int, seed: int) -> Tensor:
    """``rows`` rows of ``seq`` token ids, drawn from ``seed``."""
    vocabulary = server.model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (rows, seq), generator=torch.Generator().manual_seed(seed)).to(server.device)
