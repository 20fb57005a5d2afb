"""A base with its adapters beside it.

All adapters lie beside the base's weights. `Server.switch` makes one of them the active one; a mixed batch names one
for each row. Only LoRA's tuners read such names: the others pass over them without a word (PEFT 0.18 to 0.21), so no
other method is served here.

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
"""The name that PEFT gives the adapter a model is made with."""

BASE = "__base__"
"""PEFT's name, in a mixed batch, for a row that no adapter changes."""

DRAWN_SIZE = 0.02
"""Standard deviation of a drawn adapter's weights, about that of LoRA's A at its start; B is as large, not zero."""


def check_served(method: Method) -> None:
    """Raise `GaugeError` for a method whose adapters cannot share a base and a batch."""
    if method.peft_config.get("peft_type") != "LORA":
        raise GaugeError(f"{method.name} has no adapters that PEFT can mix in one batch; take a LoRA method")


class Server:
    """One base and its adapters, by name, ready for inference.

    The first adapter, `FIRST`, is ``method``'s, drawn from ``seed``. ``base`` is used up: quantised where the method
    says so, and brought to ``device``. Raises `GaugeError` for a method that `check_served` refuses.
    """

    def __init__(self, base: PreTrainedModel, method: Method, *, seed: int = 0, device: str = "cpu") -> None:
        check_served(method)
        self.method = method
        self.device = device
        base = methods.prepare_base(base, method, device=device)
        if method.quantization is not None:
            with torch.no_grad():  # on a CPU, bitsandbytes packs a weight anew when it is first used
                base.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
        self.base_bytes = stored_bytes(base)
        prepared = replace(method, quantization=None, prepare_kbit=False)
        self.model: Any = methods.attach(base, prepared, seed=seed).to(device).eval()
        self.adapter_dtype = next(each.dtype for each in self.model.parameters() if each.requires_grad)
        self.merged: str | None = None
        self._draw(FIRST, seed)

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they came."""
        return list(self.model.peft_config)

    @property
    def adapters_bytes(self) -> int:
        """What all adapters together add to the base, in bytes of tensors."""
        return stored_bytes(self.model) - self.base_bytes

    def add(self, name: str, seed: int) -> None:
        """A further adapter like the first one, its weights drawn from ``seed``."""
        self._check_new(name)
        config = copy.deepcopy(self.model.peft_config[FIRST])
        with _refusing(f"adapter {name!r} cannot be added"):
            self.model.add_adapter(name, config)
        self.model.eval()  # PEFT makes the new adapter's dropout in training mode, whatever mode the model is in
        self._draw(name, seed)

    def load(self, folder: Path, name: str) -> None:
        """A further adapter from a ``folder`` that `save` or PEFT wrote.

        Raises `GaugeError` where there is none, or one of another base model; nothing of it stays then.
        """
        self._check_new(name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / file).is_file():  # PEFT would go on to look for it on the hub
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
                if unfitting:  # PEFT leaves them out in silence
                    raise ValueError(f"{len(unfitting)} tensors have no counterpart, first {unfitting[0]}")
        except GaugeError:
            if name in self.names:
                self.model.delete_adapter(name)
            raise

    def save(self, name: str, folder: Path) -> Path:
        """Write the adapter called ``name`` as PEFT does; returns the folder it lies in, at or below ``folder``."""
        self._check_known(name)
        self.model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        return folder if name == FIRST else folder / name

    def delete(self, name: str) -> None:
        """Let the adapter called ``name`` go; the active one has to be switched away from first."""
        self._check_known(name)
        if name in self.model.active_adapters:
            raise GaugeError(f"the adapter {name!r} is active; switch to another one before deleting it")
        self.model.delete_adapter(name)

    def switch(self, name: str) -> None:
        """Make the adapter called ``name`` the active one."""
        self._check_known(name)
        self._check_unmerged()
        self.model.set_adapter(name)

    def logits(self, ids: Tensor) -> Tensor:
        """What the active adapter makes of ``ids``."""
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False).logits

    def base_logits(self, ids: Tensor) -> Tensor:
        """What the base makes of ``ids``, its adapters switched off for this one call."""
        self._check_unmerged()
        with self.model.disable_adapter():
            return self.logits(ids)

    def mixed_logits(self, ids: Tensor, names: Sequence[str]) -> Tensor:
        """``ids`` in one batch, each row through the adapter that ``names`` gives it, or through the base (`BASE`)."""
        self._check_unmerged()
        for name in names:
            if name != BASE:
                self._check_known(name)
        if len(names) != len(ids):
            raise GaugeError(f"{len(ids)} rows need as many adapter names, not {len(names)}")
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False, adapter_names=list(names)).logits

    def merge(self) -> None:
        """Fold the active adapter into the base's weights."""
        self._check_unmerged()
        with warnings.catch_warnings():
            # That merging into 4 bit loses something is what is measured here.
            warnings.filterwarnings("ignore", "Merge lora module to 4-bit linear", UserWarning)
            warnings.filterwarnings("ignore", "Unmerge lora module to 4-bit linear", UserWarning)
            self.model.merge_adapter()
        self.merged = self.model.active_adapter

    def unmerge(self) -> None:
        """Take the merged adapter off the base's weights again."""
        if self.merged is None:
            raise GaugeError("no adapter is merged; nothing can be unmerged")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unmerge lora module to 4-bit linear", UserWarning)
            self.model.unmerge_adapter()
        self.merged = None

    def turn_off(self) -> None:
        """Switch all adapters off until `turn_on`: rows go through the base, which is then as fast as it is alone."""
        self._check_unmerged()
        self.model.base_model.disable_adapter_layers()

    def turn_on(self) -> None:
        """Switch the adapters on again."""
        self.model.base_model.enable_adapter_layers()

    def layers(self) -> dict[str, Any]:
        """PEFT's LoRA layers by module name."""
        from peft.tuners.lora import LoraLayer

        return {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}

    def _draw(self, name: str, seed: int) -> None:
        """Fill the adapter's tensors, in the first one's dtype: PEFT's versions differ in that of an added one."""
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
            raise GaugeError(f"there is an adapter {name!r} already; give this one another name")
        if name == BASE or not name or "." in name:
            raise GaugeError(f"{name!r} cannot name an adapter: empty, with a dot, or PEFT's own word for the base")

    def _check_unmerged(self) -> None:
        if self.merged is not None:
            raise GaugeError(f"the adapter {self.merged!r} is merged into the base; unmerge it first")


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PEFT, safetensors and torch each refuse in their own way
        raise GaugeError(f"{what}: {one_line(error, 240)}") from error


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, quantisation constants and buffers of ``model``."""
    counted = counting.count(model)
    return counted.weight_bytes + counted.buffer_bytes


def grow(server: Server, number: int, seed: int = 0) -> None:
    """Add adapters, each drawn from a seed of its own, until there are ``number``."""
    for index in range(len(server.names), number):
        server.add(f"task-{index}", seed + index)


def token_ids(server: Server, rows: int, seq: int, seed: int) -> Tensor:
    """``rows`` rows of ``seq`` token ids, drawn from ``seed``."""
    vocabulary = server.model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (rows, seq), generator=torch.Generator().manual_seed(seed)).to(server.device)
