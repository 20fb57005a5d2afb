"""The target modules of a method in an architecture, found in the built model by its structure and module names.

Architectures name the same projections differently, fuse them (GPT-2's c_attn, Phi-3's qkv_proj) or factor them (latent
attention's q_a_proj, q_b_proj), and not every layer of a hybrid has them. Names are compared by whole components, since
``qkv_proj`` ends with ``v_proj`` but is not one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from torch import nn

QUERY, KEY, VALUE, OUTPUT = "query", "key", "value", "output"

_ROLES: dict[tuple[str, ...], tuple[str, ...]] = {
    (QUERY,): ("q_proj", "q_a_proj", "q_b_proj", "query", "query_proj", "q", "wq", "Wq", "project_q", "receptance"),
    (KEY,): ("k_proj", "key", "key_proj", "k", "wk", "Wk", "project_k"),
    (VALUE,): ("v_proj", "value", "value_proj", "v", "wv", "Wv", "project_v"),
    (KEY, VALUE): ("kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    (QUERY, KEY, VALUE): (
        "qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj_qkv", "in_proj_qkvz",
    ),
    (OUTPUT,): (
        "o_proj", "out_proj", "dense", "c_proj", "output", "o_a_proj", "o_b_proj", "wo", "Wo", "attention_out",
    ),
}  # fmt: skip
ROLES = {name: roles for roles, names in _ROLES.items() for name in names}
"""Names of attention's linear layers in transformers, each with its outputs."""

LATENT = ("q_a_proj", "kv_a_proj_with_mqa", "o_a_proj")
"""Projections into a latent space: the layer after them outputs queries, keys and values."""

DOWN = (
    "down_proj", "fc2", "fc_out", "dense_4h_to_h", "c_proj", "w2", "proj_down", "output_linear", "linear2", "lin2",
    "w_out", "Wo", "value", "2",
)  # fmt: skip
"""Names of the last linear layer of a dense feed-forward block in transformers."""

_BLOCK_LISTS = ("layers", "h", "blocks")
_CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn")
MIXERS = (
    "self_attn", "attn", "attention", "self_attention", "multi_head_attention", "linear_attn", "mixer", "mamba",
    "temporal_block", "mlstm_layer", "conv",
)  # fmt: skip
"""Names of a block's token mixer in transformers: attention, linear attention, state space."""


@dataclass(frozen=True)
class Adapted:
    """A module of the base model that a method adapts.

    Attributes:
        module: its name inside a decoder block (``self_attn.q_proj``), or in the model if it is outside the blocks.
        layers: the number of blocks in which it is adapted; 0 outside the blocks.
        of_layers: the number of blocks in the model; 0 outside the blocks.
    """

    module: str
    layers: int
    of_layers: int


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of ``model`` by full name: ``nn.Linear`` with its subclasses (bitsandbytes' layers are), and
    transformers' ``Conv1D`` (GPT-2), a linear layer with a transposed weight."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def sizes(linear: Any) -> tuple[int, int]:
    """Input and output features of a linear layer from `linear_layers`."""
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    inputs, outputs = linear.weight.shape  # Conv1D
    return inputs, outputs


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a causal language model, in order; of a vision-language model, those of its text model.

    Raises `GaugeError` if the model has no list of blocks.
    """
    from torch import nn

    # `get_decoder` does not cover every architecture; `base_model` and `model` cover the rest.
    get_decoder = getattr(model, "get_decoder", lambda: model)
    base = getattr(model, "base_model", model)
    for decoder in (getattr(base, "language_model", None), get_decoder(), base, getattr(model, "model", None)):
        for name in _BLOCK_LISTS:
            blocks = getattr(decoder, name, None)
            if isinstance(blocks, nn.ModuleList) and len(blocks) > 0:
                return list(blocks)
    raise GaugeError(
        f"no list of decoder blocks found in {type(model).__name__} (searched for {', '.join(_BLOCK_LISTS)}); "
        "use a decoder-only model"
    )


def block_names(model: nn.Module) -> list[str]:
    """The full names of the decoder blocks, in order; empty if the model has no list of blocks."""
    try:
        blocks = decoder_blocks(model)
    except GaugeError:
        return []
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in blocks]


def attention_projections(model: nn.Module, roles: Iterable[str] = (QUERY, KEY, VALUE, OUTPUT)) -> list[str]:
    """The full names of the linear layers of attention with the given ``roles``, block by block.

    Attention is any module of a decoder block with linear layers for queries, keys and an output, whether fused,
    factored or separate: softmax attention, latent attention and linear attention (Gated DeltaNet, lightning attention,
    RWKV). The gates and decays of linear attention do not count, and Mamba's state-space layers have no such
    projections. The list is empty for a model without attention.
    """
    wanted = set(roles)
    return [name for name, given in _attention(model) if wanted & set(given)]


def keys_and_values(model: nn.Module) -> list[str]:
    """The full names of the layers that output keys and values; in latent attention, the second of the two layers."""
    return [name for name in attention_projections(model, (KEY, VALUE)) if _own_name(name) not in LATENT]


def down_projections(model: nn.Module) -> list[str]:
    """The full names of the last linear layer of each dense feed-forward in a decoder block, shared experts included.

    Routed experts are left out: in transformers 5 they are one 3-D parameter per layer, not linear layers.
    """
    attention = {name for name, _ in _attention(model)}
    return [
        name
        for block in block_names(model)
        for name in _inside(linear_layers(model), block)
        if _own_name(name) in DOWN and name not in attention
    ]


def mixer_inputs(model: nn.Module) -> list[str]:
    """The full names of the input projections of the mixers in a model without attention (Mamba).

    Layers whose weight is used without calling the layer are left out, since an adapter on them would have no effect:
    PEFT rejects ``out_proj`` and ``conv1d``, and the model multiplies by the weight of ``dt_proj`` itself.
    """
    return [
        name
        for block in block_names(model)
        for name in _inside(linear_layers(model), block)
        if _mixes_tokens(name.removeprefix(f"{block}.")) and _own_name(name) in ("in_proj", "x_proj")
    ]


def _mixes_tokens(name: str) -> bool:
    return name.partition(".")[0] in MIXERS


def _own_name(name: str) -> str:
    """The last component of ``name`` except ``linear``, the name of a layer inside a wrapper."""
    parts = [part for part in name.split(".") if part != "linear"]
    return parts[-1] if parts else name


def _inside(names: Iterable[str], parent: str) -> list[str]:
    return [name for name in names if name.startswith(f"{parent}.")]


def _attention(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The projections of attention by full name, with the outputs of each."""
    linears = linear_layers(model)
    for block in block_names(model):
        families: dict[str, list[str]] = {}
        for name in _inside(linears, block):
            if not set(name.split(".")) & {*_CROSS_ATTENTION}:
                families.setdefault(name.removesuffix(".linear").rpartition(".")[0], []).append(name)
        taken: list[str] = []
        for parent, names in families.items():  # parents come before what is inside them
            if any(parent.startswith(f"{outer}.") for outer in taken):
                continue  # such as the indexer of sparse attention, which selects tokens but does not mix them
            found = [(name, ROLES[_own_name(name)]) for name in names if _own_name(name) in ROLES]
            given = {role for _, roles in found for role in roles}
            # Values need no layer: in Gemma 4 they are the keys. RWKV's feed-forward has all layers but an output.
            if {QUERY, KEY, OUTPUT} <= given:
                taken.append(parent)
                yield from found


def as_targets(model: nn.Module, *groups: Sequence[str]) -> list[list[str]] | list[str]:
    """Each group of full names as PEFT's ``target_modules``, matching these modules and no others.

    These are the shortest endings of names that suffice. If an ending would match other modules too (a vision tower has
    its own ``q_proj``), each group becomes a regular expression over full names.
    """
    names = [name for name, _ in model.named_modules()]
    endings = [sorted({_ending(name, set(group), names) for name in group}) for group in groups]
    if not any(part.isdigit() for group in endings for ending in group for part in ending.split(".")):
        return endings
    return [_pattern(group, names) for group in groups]


def _pattern(wanted: Sequence[str], names: Sequence[str]) -> str:
    """A regular expression that matches ``wanted`` and no other of ``names``, for any layer number if possible."""
    parents: dict[str, dict[str, None]] = {}
    for name in wanted:
        parent, _, own = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)).rpartition(r"\.")
        parents.setdefault(parent, {})[own] = None
    pattern = "|".join(rf"{parent}\.(?:{'|'.join(sorted(owns))})" for parent, owns in sorted(parents.items()))
    if {name for name in names if re.fullmatch(pattern, name)} == set(wanted):
        return pattern
    return "|".join(map(re.escape, wanted))


def orientation(model: nn.Module, wanted: Iterable[str]) -> dict[str, bool]:
    """PEFT's ``fan_in_fan_out`` setting if layers of ``wanted`` hold their weight as (in, out); otherwise empty."""
    layers = linear_layers(model)
    return {} if all(hasattr(layers[name], "in_features") for name in wanted) else {"fan_in_fan_out": True}


def _ending(name: str, wanted: set[str], names: Sequence[str]) -> str:
    parts = name.split(".")
    for start in range(len(parts) - 1, 0, -1):
        ending = ".".join(parts[start:])
        if all(other in wanted for other in names if other == ending or other.endswith(f".{ending}")):
            return ending
    return name


def unmatched(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The entries of PEFT's ``target_modules`` in ``names`` that match neither a name in ``modules`` nor its end."""
    components = [module.split(".") for module in modules]
    endings = {".".join(parts[start:]) for parts in components for start in range(len(parts))}
    return sorted(name for name in names if name not in endings)


# --- adapted modules ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """The names in a base model before adapters are attached: all modules, and the decoder blocks in order."""

    modules: frozenset[str]
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Places:
        """The places of ``model``, a base without adapters."""
        return cls(frozenset(name for name, _ in model.named_modules() if name), tuple(block_names(model)))


def adapted(attached: nn.Module, base: Places) -> tuple[Adapted, ...]:
    """The modules of the ``base`` that ``attached`` adapts, in the model's order.

    Empty for methods that adapt no module, such as virtual tokens, which are added to the model's input.
    """
    tuner: Any = getattr(attached, "base_model", None)
    found: dict[str, None] = {}
    parameters = list(getattr(tuner, "targeted_parameter_names", ()))
    holders = {name.rpartition(".")[0] for name in parameters}
    for name in (*getattr(tuner, "targeted_module_names", ()), *parameters, *_trained_places(attached, base)):
        if name not in holders:
            found[name] = None
    return tuple(_by_block(found, base))


def _trained_places(attached: nn.Module, base: Places) -> Iterator[str]:
    """The innermost module of the base around each trained parameter."""
    for name, parameter in attached.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = [part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"]
        inside = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        place = next((path for path in inside if path in base.modules), None)
        if place is not None:
            yield place


def _by_block(names: Iterable[str], base: Places) -> Iterator[Adapted]:
    counts: dict[str, int] = {}
    for name in names:
        block = next((block for block in base.blocks if name == block or name.startswith(f"{block}.")), None)
        inner = name if block is None else (name.removeprefix(block).lstrip(".") or "the whole block")
        counts[inner] = counts.get(inner, 0) + (block is not None)
    for module, layers in counts.items():
        yield Adapted(module, layers, len(base.blocks) if layers else 0)
