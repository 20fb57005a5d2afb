"""A fake tensor mode that repeats known operators quickly: private parts of torch.

A plan runs every layer of a model several times, so that nearly every operator has run before on tensors of the same
shapes. torch's own cache answers those, but checks on every call what cannot differ here; that was half of a plan's
time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch._subclasses import fake_tensor

from peft_gauge._internals.torch import FakeTensor, FakeTensorMode

_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
_DEVICE_OF = torch.ops.prim.device.default
_VALUE_OF = torch.ops.aten._local_scalar_dense.default
_THROWS: Any = getattr(torch._C, "_set_throw_on_mutable_data_ptr", None)
_WARNS: Any = getattr(torch._C, "_set_warn_deprecated_on_mutable_data_ptr", None)

Recipe = Callable[["QuickFakeTensorMode", Any], Any]
"""Makes the output of a known operator from its positional arguments."""


class QuickFakeTensorMode(FakeTensorMode):
    """`FakeTensorMode` with a second cache before torch's own.

    A recipe is kept for a call that torch's cache answers, and for others whose outputs depend on nothing else either:
    `_unsafe_view`, operators on lists and bitsandbytes' own. The key has all that torch's key has for strided tensors;
    any other call, and any mode with symbolic shapes, goes to torch. With ``fake_tensor_cache_crosscheck_enabled`` of
    torch's settings each recipe's output is checked, as torch checks its own (a contract test does so). A torch without
    the private names used here never has a recipe.
    """

    _recipes: ClassVar[dict[tuple[object, ...], Recipe]] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._answered = False  # whether the present call is known to torch's cache
        # How torch marks a fake tensor, which has no data to point to.
        self._guard: Any = {True: _WARNS, False: _THROWS}.get(
            getattr(self, "_allow_unsafe_data_ptr_access", None)  # type: ignore[arg-type]
        )
        self._can_repeat = (
            self.shape_env is None
            and self._guard is not None
            and getattr(self, "cache_enabled", False)
            and hasattr(FakeTensorMode, "_output_from_cache_entry")
        )

    @classmethod
    def cache_clear(cls) -> None:
        """Clear both caches."""
        super().cache_clear()
        cls._recipes.clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # as for `DispatchMode`
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._can_repeat:
            return self.dispatch(func, types, args, kwargs)
        if func is _DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if func is _VALUE_OF and type(args[0]) is FakeTensor and args[0].constant is not None:
            return func(args[0].constant)
        parts = [
            func,
            torch.get_default_dtype(),
            torch._C._get_default_device(),
            torch.is_inference_mode_enabled(),
        ]
        if not (self._describe(parts, args) and (not kwargs or self._describe(parts, kwargs))):
            return self.dispatch(func, types, args, kwargs)
        key = tuple(parts)
        recipe = self._recipes.get(key)
        if recipe is not None:
            output = recipe(self, args)
            if self.cache_crosscheck_enabled:
                self._check(output, func, types, args, kwargs)
            return output
        output = self.dispatch(func, types, args, kwargs)
        # It ends with the call: an operator is not known because parts of its decomposition are.
        answered, self._answered = self._answered, False
        if answered or _depends_on_shapes(func):
            recipe = _recipe(func, args, output)
            if recipe is not None:
                self._recipes[key] = recipe
        return output

    def _output_from_cache_entry(self, *given: Any) -> Any:
        output = super()._output_from_cache_entry(*given)
        self._answered = True
        return output

    def _make_cache_entry(self, *args: Any) -> Any:
        try:
            return super()._make_cache_entry(*args)
        finally:
            self._answered = False  # it makes an output to check the entry, which may still be refused

    def _check(self, output: Any, func: Any, types: Any, args: Any, kwargs: Any) -> None:
        if isinstance(output, list):  # torch's check knows tuples only
            return
        with fake_tensor.disable_fake_tensor_cache(self):
            self._crosscheck_cache_output(output, func, types, args, kwargs)

    def _describe(self, parts: list[object], values: Any) -> bool:
        """Append to ``parts`` what the output can depend on; whether these are all plain values and strided fakes."""
        kind = type(values)
        if kind is dict:
            parts.extend(values)
            values = values.values()
        elif kind is not tuple and kind is not list:
            return False
        parts.append((kind, len(values)))
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if (
                    value.layout is not torch.strided
                    or value.fake_mode is not self
                    or value.constant is not None
                    or value._has_symbolic_sizes_strides
                ):
                    return False
                parts += (
                    value.dtype,
                    value.shape,
                    value.stride(),
                    value.storage_offset(),
                    value.untyped_storage().nbytes(),
                    value.fake_device,
                    value.requires_grad,
                    value.is_conj(),
                    value.is_neg(),
                    value.is_inference(),
                )
            elif kind in _PLAIN:
                parts += (kind, value)
            elif not self._describe(parts, value):
                return False
        return True


def _depends_on_shapes(func: Any) -> bool:
    """Whether ``func``, which torch's cache leaves out, can be repeated all the same."""
    if func is _UNSAFE_VIEW:
        return True
    name = func.name()
    return (
        bool(name.startswith(("aten::_foreach_", "bitsandbytes::")))
        and torch.Tag.data_dependent_output not in func.tags
    )


def _recipe(func: Any, args: Any, output: Any) -> Recipe | None:
    """How to make ``output`` from other arguments of the same description; None for an unknown kind."""
    if output is None or type(output) is int:
        return lambda mode, args: output
    if type(output) in (tuple, list):
        kind, several = type(output), [_recipe(func, args, each) for each in output]
        if not all(several):
            return None
        return lambda mode, args: kind(each(mode, args) for each in several if each is not None)
    if type(output) is not FakeTensor or output.layout is not torch.strided or output.is_conj() or output.is_neg():
        return None
    for index, each in enumerate(args):
        if each is output:
            return lambda mode, args: args[index]
    if output._has_symbolic_sizes_strides or output.constant is not None:
        return None
    return _tensor(func, args, output)


def _tensor(func: Any, args: Any, output: Any) -> Recipe | None:
    shape, stride, offset, dtype = tuple(output.shape), output.stride(), output.storage_offset(), output.dtype
    device, trained = output.fake_device, output.requires_grad
    attributes = {name: value for name, value in vars(output).items() if name != "fake_mode"}
    source = None
    if func.is_view or func is _UNSAFE_VIEW:
        sources = [index for index, each in enumerate(args) if isinstance(each, torch.Tensor)]
        if len(sources) != 1:
            return None
        (source,) = sources

    def made(mode: QuickFakeTensorMode, args: Any) -> FakeTensor:
        if source is None:
            bare = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            bare = torch.empty(0, dtype=dtype, device="meta")
            bare.set_(args[source].untyped_storage(), offset, shape, stride)
        tensor = torch.Tensor._make_subclass(
            FakeTensor, bare, trained, dispatch_device=True, device_for_backend_keys=device
        )
        mode._guard(tensor)
        vars(tensor).update(attributes, fake_mode=mode)
        return tensor

    return made
