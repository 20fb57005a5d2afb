"""The call of the model in the planned step: as in the measured step, or with the requested variation."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peft_gauge._internals import cut_cross_entropy
from peft_gauge._internals.torch import modules_of, storage_key
from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from collections.abc import Iterator

LOSS_CHUNKS = 8
"""Chunks along the sequence of the chunked loss; torchtune's `CEWithChunkedOutputLoss` has the same default."""
IGNORED_LABEL = -100


class ModelCall(nn.Module):
    """Wraps the model of a `TrainingJob`.

    ``use_cache`` overrides the job's value; with ``hold_outputs`` the model's outputs live until `let_go`.
    ``output_bytes``: the last call's outputs, one entry per storage, without the loss.
    """

    def __init__(self, model: nn.Module, *, use_cache: bool = False, hold_outputs: bool = False) -> None:
        super().__init__()
        self.model = model
        self.use_cache = use_cache
        self.hold_outputs = hold_outputs
        self.output_bytes: list[int] = []
        self._held: list[Any] = []

    def forward(self, use_cache: bool = False, **batch: Tensor) -> Any:
        outputs = self.model(**batch, use_cache=use_cache or self.use_cache)
        storages = {}
        for tensor in _tensors({name: value for name, value in outputs.items() if name != "loss"}):
            storage = tensor.untyped_storage()
            storages[storage_key(storage)] = storage.nbytes()
        self.output_bytes = list(storages.values())
        if self.hold_outputs:
            self._held = [outputs]
        return outputs

    def let_go(self) -> None:
        """Drop held outputs, as the next assignment to a training loop's variable does."""
        self._held = []


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "layers"):  # a transformers cache: key and value tensors per layer
        for layer in value.layers:
            yield from _tensors([getattr(layer, "keys", None), getattr(layer, "values", None)])


class _HiddenStates(nn.Module):
    """Wraps the output projection, whose weights stay in the model, so that its loss receives hidden states."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def chunk_loss(base: nn.Module, tokens: int | None = None) -> None:
    """Make ``base``, a causal LM of transformers, compute its loss in chunks along the sequence, in place.

    This models chunked and fused losses (torchtune, Liger Kernel): logits exist for one chunk at a time, in
    forward and, recomputed, in backward. The loss's value is the same; kernels that fuse more may need less.
    ``tokens``: at most so many of the batch in a chunk, at least one of each row (default: `LOSS_CHUNKS` chunks).
    Raises `GaugeError` if the model has no output projection of its own or no replaceable loss.
    """
    head, softcap = _head_apart(base, "chunked")

    def of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = _capped(head(hidden), softcap).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")

    def loss(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows, seq = targets.shape
        length = -(-seq // LOSS_CHUNKS) if tokens is None else max(tokens // rows, 1)
        for hidden, target in zip(logits.split(length, dim=1), targets.split(length, dim=1), strict=True):
            total = total + checkpoint(of_chunk, hidden, target, use_reentrant=False)
        return total / (targets != IGNORED_LABEL).sum()

    base.loss_function = loss  # type: ignore[assignment]


def cut_loss(base: nn.Module) -> None:
    """Make ``base``, a causal LM of transformers, compute its loss by the installed Cut Cross-Entropy, in place.

    As the library's own patches of transformers do, for every architecture: the loss takes hidden states and the output
    projection's weight, and the model returns no logits. Raises `GaugeError` as `chunk_loss`, and for an output
    projection with a bias that the installed package has no argument for.
    """
    head, softcap = _head_apart(base, "cce")
    bias = getattr(head, "bias", None)
    if bias is not None and not cut_cross_entropy.takes_bias():
        raise GaugeError(
            f"--loss cce cannot be planned for {type(base).__name__}: its output projection has a bias, which "
            f"{cut_cross_entropy.release()} does not take"
        )

    def loss(logits: Tensor, labels: Tensor, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Tensor:
        hidden = logits
        if head.weight.dtype is torch.bfloat16 and hidden.dtype is torch.float32:
            hidden = hidden.to(head.weight.dtype)  # as both Unsloth and axolotl do before they call the library
        found = cut_cross_entropy.linear_cross_entropy(
            hidden,
            head.weight,
            labels,
            bias=getattr(head, "bias", None),  # read now, when it may be a fake
            softcap=softcap,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        return found if num_items_in_batch is None else found / num_items_in_batch

    base.loss_function = loss  # type: ignore[assignment]
    forward = base.forward

    @functools.wraps(forward)
    def without_logits(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs["logits"] = None
        return outputs

    base.forward = without_logits


def _head_apart(base: nn.Module, loss: str) -> tuple[Any, float | None]:
    """The output projection of ``base``, which from now on gives its loss the hidden states; and the bound that the
    model puts on its logits, if any, which is then the loss's to apply."""
    head = base.get_output_embeddings()  # type: ignore[operator]
    name = next((name for name, module in base.named_children() if module is head), None)
    if head is None or name is None or not isinstance(getattr(type(base), "loss_function", None), property):
        raise GaugeError(f"--loss {loss} cannot be planned for {type(base).__name__}: its loss is fixed")
    modules_of(base)[name] = _HiddenStates(head)
    config: Any = base.config
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        config.final_logit_softcapping = None
    return head, softcap


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@contextlib.contextmanager
def cut_loss_on_fakes() -> Iterator[None]:
    """Around a step on fakes whose loss is `cut_loss`'s; raises `GaugeError` if it refuses the tensors' data types."""
    try:
        with cut_cross_entropy.cut_cross_entropy_on_fakes():
            yield
    except AssertionError as error:
        if not str(error).startswith("Backwards"):
            raise
        raise GaugeError(
            f"{cut_cross_entropy.release()} refuses this step ({error}); plan it with --dtype bfloat16, and a base in "
            "4 or 8 bit with --no-prepare-kbit"
        ) from error
