"""Run a real training step without its memory, on fake tensors that behave as on a CUDA device.

Fake tensors have shapes, strides, storages and autograd, but no data. They are on device `cpu`, because a CPU build of
torch has no autograd thread for a `cuda` device. Where the CPU's operators would save other tensors for backward than
CUDA's, `kernels.cuda_kernels` routes to CUDA's operator; every build of torch has its shape rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_gauge._internals import bitsandbytes as bnb_internals
from peft_gauge._internals.torch import (
    FakeTensor,
    FakeTensorMode,
    buffers_of,
    hooks_of,
    parameters_of,
    storage_key,
)
from peft_gauge._internals.torch_fakes import QuickFakeTensorMode

if TYPE_CHECKING:
    from collections.abc import Iterator


def fake_mode() -> FakeTensorMode:
    """A fake mode that accepts small real tensors (constants of a closure) among fake ones."""
    return QuickFakeTensorMode(allow_non_fake_inputs=True)


def to_fake(model: nn.Module, mode: FakeTensorMode) -> dict[int, torch.Tensor]:
    """Replace, in place, each parameter, buffer and quantization constant of `model` by a fake on device `cpu`.

    Shapes, strides, dtypes, `requires_grad` and attributes stay, and so do ties: a parameter used twice becomes one
    fake, and tensors that share a storage still share one. The originals may be on `meta` or real. Unpacked 4-bit
    parameters are packed as bitsandbytes does it on the first move to a device.

    Returns:
        id of each original tensor -> its fake.
    """
    faker = _Faker(mode)
    for module in model.modules():
        parameters, buffers = parameters_of(module), buffers_of(module)
        for name, parameter in parameters.items():
            if parameter is not None:
                parameters[name] = faker.parameter(parameter)
        for name, buffer in buffers.items():
            if buffer is not None:
                buffers[name] = faker.tensor(buffer)
        for name, value in list(vars(module).items()):
            if name not in _REGISTRIES:
                module.__dict__[name] = faker.value(value)
    return faker.made


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's lazy state by one step on fake gradients, so that the traced step is a steady one."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# Entries of an `nn.Module`'s dictionary other than the module's own attributes.
_REGISTRIES = frozenset(vars(nn.Module()))


class _Faker:
    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.made: dict[int, torch.Tensor] = {}
        self._originals: list[Any] = []  # an id is unique only while its object lives
        self._storages: dict[int, torch.Tensor] = {}
        self._states: dict[int, Any] = {}

    def value(self, value: Any) -> Any:
        """A module's attribute; dictionaries, lists and a library's helper objects are changed in place."""
        if isinstance(value, torch.Tensor):
            return self.parameter(value) if isinstance(value, nn.Parameter) else self.tensor(value)
        if is_quant_state(value):
            return self.quant_state(value)
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(self.value(item) for item in value)
        inner = _inside(value)
        if isinstance(inner, dict):
            inner.update({key: self.value(item) for key, item in inner.items()})
        elif inner is not None:
            inner[:] = [self.value(item) for item in inner]
        return value

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        known = self.made.get(id(tensor))
        if known is None:
            known = self._remember(tensor, self._view(tensor))
        return known

    def parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        if isinstance(parameter, FakeTensor):
            return parameter
        known = self.made.get(id(parameter))
        if known is not None:
            return known
        if getattr(parameter, "bnb_quantized", True):
            data, attributes = self._view(parameter), dict(vars(parameter))
        else:
            data, attributes = self._packed(parameter)
        with self.mode:
            fake = nn.Parameter(data, requires_grad=parameter.requires_grad)
        if is_quant_state(attributes.get("quant_state")):
            attributes["quant_state"] = self.quant_state(attributes["quant_state"])
            if attributes.get("module") is not None:
                attributes["module"].quant_state = attributes["quant_state"]
        for name, value in attributes.items():
            setattr(fake, name, self.tensor(value) if isinstance(value, torch.Tensor) else value)
        _carry_hooks(parameter, fake)
        return self._remember(parameter, fake)

    def quant_state(self, state: Any) -> Any:
        """bitsandbytes' `QuantState` with fake tensors; the nested state likewise."""
        if id(state) not in self._states:
            copy = object.__new__(type(state))
            for name, value in vars(state).items():
                if isinstance(value, torch.Tensor):
                    value = self.tensor(value)
                elif is_quant_state(value):
                    value = self.quant_state(value)
                setattr(copy, name, value)
            self._states[id(state)] = self._states[id(copy)] = copy
            self._originals += [state, copy]
        return self._states[id(state)]

    def _remember(self, original: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        self.made[id(original)] = fake
        self._originals.append(original)
        return fake

    def _view(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        with self.mode, torch.no_grad():
            whole = self._storages.get(storage_key(storage))
            if whole is None:
                self._originals.append(storage)
                if tensor.nbytes == storage.nbytes() and tensor.is_contiguous():
                    # One operator instead of five, for nearly all tensors.
                    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
                    self._storages[storage_key(storage)] = whole
                    return whole
                whole = torch.empty(storage.nbytes(), dtype=torch.uint8)
                self._storages[storage_key(storage)] = whole
            # Not `set_`: a fake that was set to a storage keeps it forever, also after `parameter.data = other`.
            base = whole.view(-1).view(torch.uint8)
            typed = base[: base.numel() // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
            return typed.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).detach()

    def _packed(self, parameter: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """The result of `Params4bit._quantize` for a 16- or 32-bit weight, by its own code on a fake."""
        from bitsandbytes import functional

        code_books = bnb_internals.code_books()
        if "dynamic" not in code_books:  # it needs values, and the library caches it
            code_books["dynamic"] = functional.create_dynamic_map()
        with self.mode, torch.no_grad():
            weight = torch.empty(parameter.shape, dtype=parameter.dtype)
            packed, state = functional.quantize_4bit(
                weight,
                blocksize=parameter.blocksize,
                compress_statistics=parameter.compress_statistics,
                quant_type=parameter.quant_type,
                quant_storage=parameter.quant_storage,
            )
        return packed, {**vars(parameter), "quant_state": state, "bnb_quantized": True}


def plain_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that modules hold neither as parameters nor as buffers: attributes, also within containers."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _REGISTRIES:
                yield from _tensors_in(value)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    inner = value if type(value) is tuple else _inside(value)
    for item in inner.values() if isinstance(inner, dict) else inner or ():
        yield from _tensors_in(item)


def _inside(value: Any) -> dict[Any, Any] | list[Any] | None:
    """The content of a container; for a PEFT helper object (a sampler, an allocator of ranks) its attributes."""
    if type(value) in (dict, list):
        held: dict[Any, Any] | list[Any] = value
        return held
    is_helper = type(value).__module__.startswith("peft.") and hasattr(value, "__dict__")
    return vars(value) if is_helper and not isinstance(value, (nn.Module, type)) else None


def _carry_hooks(original: torch.Tensor, fake: torch.Tensor) -> None:
    """Copy gradient hooks: they allocate in the step too (a projection of the gradient, a mask)."""
    hooks, hooks_after = hooks_of(original)
    for hook in hooks:
        fake.register_hook(hook)
    for hook in hooks_after:
        fake.register_post_accumulate_grad_hook(hook)


def is_quant_state(value: Any) -> bool:
    return type(value).__name__ == "QuantState"
