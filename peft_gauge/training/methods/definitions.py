"""The methods as data; a variant is defined by its differences from a parent method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peft_gauge.errors import unknown
from peft_gauge.training.bottleneck import BottleneckConfig

# Target sets, by the names of these linear layers in Llama. In a method, each stands for the layers with that role in
# any architecture (`peft_gauge.training.targets`). Targets in an adapter config are lists instead, which PEFT matches.
ATTENTION_QV = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KEYS_VALUES_DOWN = ("k_proj", "v_proj", "down_proj")
ALL_LINEAR = "all-linear"
LINEAR_LAYERS = "linear-layers"
"""In a tuple of target modules: the names of all modules whose class has Linear in its name, except output heads.
axolotl and LLaMA-Factory choose so; PEFT's `ALL_LINEAR` has routers and experts too."""

KEPT_IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT types whose virtual tokens are keys and values in every layer."""

RANKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Quantization:
    """The format of the frozen base: nf4, fp4 or int8; ``double_quant`` and ``compute_dtype`` (default: the base's own
    dtype) apply to the 4-bit formats."""

    quant_format: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = True
    compute_dtype: str | None = None


@dataclass(frozen=True)
class Cast:
    """A cast of the base's parameters to ``dtype``: of those in whose name the regular expression ``names`` is found,
    with ``vectors_only`` of those with one dimension, and with ``model_type`` in models of that type only."""

    names: str
    dtype: str
    vectors_only: bool = False
    model_type: str | None = None


@dataclass(frozen=True)
class Blocks:
    """The part of a base that is trained: of its last ``number`` blocks (first, if negative) the ``modules`` (``all``,
    or names of a block's direct children), and the ``extra`` modules outside of blocks."""

    number: int
    modules: tuple[str, ...] = ("all",)
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        kind: full, peft (with ``peft_config``, the content of an ``adapter_config.json``) or bottleneck (with
            ``bottleneck``).
        prepare_kbit: call `peft.prepare_model_for_kbit_training`, which casts parameters in 16 bit to float32.
        casts: of the base, in order, after its preparation and before an adapter is attached.
        autocast_adapter_dtype: PEFT's setting; its default keeps 16-bit adapters in float32.
        trains: `Blocks`, or regular expressions: then only parameters in whose name one is found are trained (names of
            the model that is called, with an adapter's prefix). ``None``: all that the method trains.
        trained_in_float32: cast what is trained to float32, at the end.
        checkpoints_trained_only: with gradient checkpointing, blocks without a trained parameter are left out of it.
        starts_as_base: before the first step, the outputs are the base model's (LoRA, IA³, bottleneck adapters with a
            zero up-projection).
        merges: the trained update can be merged into the base weights.
    """

    name: str
    title: str
    kind: Literal["full", "peft", "bottleneck"]
    peft_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    bottleneck: BottleneckConfig | None = None
    quantization: Quantization | None = None
    prepare_kbit: bool = False
    casts: tuple[Cast, ...] = ()
    autocast_adapter_dtype: bool = True
    trains: Blocks | tuple[str, ...] | None = None
    trained_in_float32: bool = False
    checkpoints_trained_only: bool = False
    starts_as_base: bool = True
    merges: bool = False

    def variant(self, name: str, title: str, **changes: Any) -> Method:
        """This method under another ``name``, with ``changes``; a change of ``peft_config`` is merged into it."""
        if "peft_config" in changes:
            changes["peft_config"] = {**self.peft_config, **changes["peft_config"]}
        return replace(self, name=name, title=title, **changes)


_LORA_CONFIG = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ATTENTION,
    "task_type": "CAUSAL_LM",
}

FULL = Method("full", "full fine-tuning", "full")
LORA = Method("lora", "LoRA", "peft", peft_config=_LORA_CONFIG, merges=True)
QLORA = LORA.variant("qlora", "QLoRA", quantization=Quantization(), prepare_kbit=True)
BOTTLENECK = Method(
    "bottleneck", "bottleneck adapters (Houlsby)", "bottleneck", bottleneck=BottleneckConfig(style="houlsby")
)
PREFIX = Method(
    "prefix",
    "prefix tuning",
    "peft",
    peft_config={"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20, "task_type": "CAUSAL_LM"},
    starts_as_base=False,
)
PROMPT = Method(
    "prompt",
    "prompt tuning",
    "peft",
    peft_config={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20, "task_type": "CAUSAL_LM"},
    starts_as_base=False,
)
# Keys, values and the feed-forward's inner activations, as in Liu et al. 2022 (arXiv:2205.05638). PEFT's defaults are
# the same for Llama, but differ for other architectures.
IA3 = Method(
    "ia3",
    "IA³",
    "peft",
    peft_config={"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": KEYS_VALUES_DOWN},
    merges=True,
)

# The seven methods of a table by default, in its order.
DEFAULT_METHODS = (FULL, LORA, QLORA, BOTTLENECK, PREFIX, PROMPT, IA3)

VARIANTS = (
    *(
        LORA.variant(f"lora-r{r}", f"LoRA r={r}", peft_config={"r": r, "lora_alpha": 2 * r})
        for r in RANKS
        if r != LORA.peft_config["r"]
    ),
    LORA.variant("lora-qv", "LoRA on q,v", peft_config={"target_modules": ATTENTION_QV}),
    LORA.variant("lora-all-linear", "LoRA on all linear layers", peft_config={"target_modules": ALL_LINEAR}),
    LORA.variant("lora-no-dropout", "LoRA without dropout", peft_config={"lora_dropout": 0.0}),
    LORA.variant("lora-16bit", "LoRA, adapters kept in 16 bit", autocast_adapter_dtype=False),
    QLORA.variant("qlora-unprepared", "QLoRA, not prepared for k-bit training", prepare_kbit=False),
    replace(
        BOTTLENECK,
        name="bottleneck-pfeiffer",
        title="bottleneck adapters (Pfeiffer)",
        bottleneck=BottleneckConfig(style="pfeiffer"),
    ),
)

METHODS = {method.name: method for method in (*DEFAULT_METHODS, *VARIANTS)}


def get(name: str) -> Method:
    """The method called ``name``. Raises `GaugeError`, with the nearest names, for an unknown one."""
    if name.lower() not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name.lower()]
