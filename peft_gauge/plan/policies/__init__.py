"""Policies for tuners whose code needs values, where a plan has only shapes.

Most PEFT types attach to a model on `meta` and step with fake tensors unchanged. Some read values: a decomposition of
the base weights, a random mask, a coin that drops a module. For each of these there is a policy here, one module per
type or family. It applies only when its code is reached, and each applied policy adds one sentence to `warnings`. A
type that is not in `ATTACHING` is tried without a policy; an operation that still needs values raises `CannotPlan`,
which names it.
Order of use: `with attaching(method): methods.attach(...)` on `meta`, then `fakes.to_fake`, then one traced step
`with mode, cuda_kernels(), unpacked_sequences(), stepping(model), tracker:`.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from peft_gauge.errors import one_line
from peft_gauge.plan import kernels
from peft_gauge.plan.policies import adalora, adamss, frod, lora, prompts, shira, spectral, xlora
from peft_gauge.plan.policies.adalora import keeps_importance, update_importance
from peft_gauge.plan.policies.answers import Answers, experts, fake_operators
from peft_gauge.plan.policies.failures import CannotPlan, operation, translated
from peft_gauge.plan.policies.patches import Patches
from peft_gauge.plan.policies.prompts import extra_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import nn

    from peft_gauge.training.methods import Method

__all__ = ["CannotPlan", "attaching", "extra_inputs", "keeps_importance", "operation", "stepping", "update_importance"]

ATTACHING: Mapping[str, Callable[[Patches, Mapping[str, Any]], None]] = {
    "LORA": lora.attach,
    "SHIRA": shira.attach,
    "ADAMSS": adamss.attach,
    "FROD": frod.attach,
    "FOURIERFT": spectral.attach,
    "WAVEFT": spectral.attach,
    "XLORA": xlora.attach,
    "ADALORA": adalora.attach,
    "PROMPT_TUNING": prompts.attach,
    "MULTITASK_PROMPT_TUNING": prompts.attach,
}
"""Replacements of a type's initialisation, by PEFT type: called before its code runs, with the adapter's config."""

# The beginnings of PEFT's own warnings about config entries without effect.
_WITHOUT_EFFECT = (
    "Unexpected keyword arguments", "target_modules=", "target_parameters=", "The following rank_pattern",
    "The following alpha_pattern", "You have passed exclude_modules",
)  # fmt: skip

# Types whose boolean values are true, since false would leave out the costly path; with the meaning of true.
_YES = {
    "LOHA": "no layer dropped by module_dropout",
    "LOKR": "no layer dropped by module_dropout",
    "CPT": "the projection of learned tokens taken, as from the second step on",
}


@contextmanager
def attaching(method: Method | Mapping[str, Any]) -> Iterator[list[str]]:
    """Enter around `methods.attach` on `meta`: initialisations that read weights create only tensors of the right
    shapes.

    Args:
        method: the method, or the content of an `adapter_config.json`.

    Yields:
        The warnings, one sentence per applied policy; complete when the block ends.

    Raises:
        CannotPlan: the initialisation needs values in a way that no policy covers.
    """
    config: Mapping[str, Any] = method if hasattr(method, "keys") else method.peft_config  # type: ignore[assignment]
    said: list[str] = []
    policy = ATTACHING.get(str(config.get("peft_type", "")))
    with ExitStack() as stack:
        if policy is not None:
            policy(Patches(stack, said), config)
        heard = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        with translated():
            yield said
    said += _about_the_config(str(warning.message) for warning in heard)


def _about_the_config(messages: Iterable[str]) -> Iterator[str]:
    for message in dict.fromkeys(messages):
        if message.startswith(_WITHOUT_EFFECT):
            yield f"PEFT warns: {one_line(message.partition('. ')[0], 240)}."


@contextmanager
def stepping(model: nn.Module) -> Iterator[list[str]]:
    """Enter around a traced step, inside the fake mode: supplies the values that operators read, with a warning for
    each.

    A boolean is false (NaN found? norm zero? token out of range?), except for types where true is the costly path; a
    number is 0; the positions of a mask are all positions, an upper bound; `unique` gives one value. A sparse tensor is
    assumed to have no duplicate positions.

    Yields:
        The warnings, one sentence per kind of supplied value and per applied policy; complete when the block ends.

    Raises:
        CannotPlan: an operation needs values in another way.
    """
    configs = list(getattr(model, "peft_config", {}).values())
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in configs}
    with ExitStack() as stack:
        patches = Patches(stack, [])
        for sentence in kernels.unrouted(model):
            patches.warn(sentence)
        lora.whole_sequence_alora(patches, wanted=any(getattr(c, "alora_invocation_tokens", None) for c in configs))
        frod.fixed_sparse_size(patches, wanted="FROD" in kinds)
        if any(isinstance(module, torch.nn.RNNBase) for module in model.modules()):
            patches.warn("A recurrent layer is traced step by step; cuDNN's fused layer may need more reserve space.")
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        # Poly and MonteCLoRA draw from distributions. (torch's compiler, once imported, turns this off for everyone.)
        stack.enter_context(patch.object(torch.distributions.Distribution, "_validate_args", False))
        yes = next((_YES[kind] for kind in sorted(kinds) if kind in _YES), "")
        answers = Answers(patches, yes, experts(model))
        stack.enter_context(fake_operators(answers.operators()))
        with translated():
            yield patches.warnings
