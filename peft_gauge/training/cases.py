"""A case (one model, method and shape on one device) as data, and the training job that is built from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft_gauge.collector import no_collector
from peft_gauge.training import methods, models

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from peft_gauge.counting import ParameterCount
    from peft_gauge.training.loops import Loop
    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord
    from peft_gauge.training.settings import StepSettings
    from peft_gauge.training.step import TrainingJob

BATCHES = 4
"""Number of different batches that a job trains on in turn."""


@dataclass(frozen=True)
class Case:
    """One configuration to build and measure. Equal cases take the same steps over the same bytes.

    Attributes:
        dtype: data type of the base weights and of a quantized base's compute.
        seed: for random weights, adapters and, if the model has no tokenizer, token ids.
        attention: as in `models.build`.
        loop: one of `peft_gauge.training.loops.LOOPS`; the settings are those of its step.
        trainer_arguments: of the trainer, as pairs, beyond the settings.
    """

    model: ModelRecord
    method: Method
    settings: StepSettings
    device: str
    dtype: str
    seed: int = 0
    attention: str | None = None
    loop: Loop = "plain"
    trainer_arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def id(self) -> str:
        """The case's name in test ids and tables."""
        checkpointing = "-checkpointing" if self.settings.grad_checkpointing else ""
        return f"{self.method.name}{checkpointing}-{self.model.name.replace('/', '--')}-{self.device}"


def build_job(
    case: Case,
    *,
    base: PreTrainedModel | None = None,
    prepared: bool = False,
    stream: Tensor | None = None,
    make: Callable[[nn.Module, list[dict[str, Tensor]]], TrainingJob] | None = None,
) -> TrainingJob:
    """The training job of ``case``, on its device.

    Args:
        base: a freshly built base model, changed in place (default: build one).
        prepared: whether ``base`` has been through `methods.prepare_base` already.
        stream: token ids to train on, of one dimension (default: tokenized or drawn here).
        make: called with the model and its batches; returns the job (default: a `TrainingJob`, or the trainer's).
    """
    import torch

    from peft_gauge.training.batches import cut, token_stream

    settings, method = case.settings, case.method
    case.model.check_sequence(settings.seq)
    if base is None:
        base = models.build(case.model, dtype=case.dtype, attn_implementation=case.attention)
    if prepared:
        method = replace(method, quantization=None, prepare_kbit=False)
    vocab_size = base.get_input_embeddings().num_embeddings
    plain = case.loop == "plain"
    if settings.grad_checkpointing:
        methods.check_checkpointing(method)
    model = methods.attach(
        base,
        method,
        grad_checkpointing=settings.grad_checkpointing and plain,  # a trainer turns it on itself
        seed=case.seed,
        device=case.device,
    )
    model.to(case.device)  # PEFT chooses the device of a new adapter
    if stream is None:
        needed = BATCHES * settings.batch * settings.seq
        stream = token_stream(models.tokenizer(case.model), vocab_size=vocab_size, tokens=needed, seed=case.seed)
    data = cut(stream, batch=settings.batch, seq=settings.seq, device=case.device)
    # Dropout uses the global generator: with the same seed, every run of a case gets the same masks.
    torch.manual_seed(case.seed)
    if make is not None:
        return make(model, data)
    if plain:
        from peft_gauge.training.step import TrainingJob

        return TrainingJob(model, data, settings)
    from peft_gauge.training import trainers
    from peft_gauge.training.trainer_job import TrainerJob

    trainers.mark_quantized(model, case.method)
    return TrainerJob(model, data, settings, loop=case.loop, arguments=dict(case.trainer_arguments))


def described(case: Case, job: TrainingJob) -> dict[str, Any]:
    """The description stored with the results of ``case``: names, and all settings that change the outcome, read back
    from the built ``job``."""
    from peft_gauge.counting import trainable_dtypes

    settings = {
        "dtype": case.dtype,
        "trainable_dtypes": sorted(trainable_dtypes(job.model)),
        "weights": case.model.weights,
        "seed": case.seed,
        **methods.effective_settings(job.model, case.method),
        **job.effective_settings(),
    }
    return {
        "method": case.method.name,
        "title": case.method.title,
        "model": case.model.name,
        "device": case.device,
        "settings": settings,
    }


_counts: dict[tuple[ModelRecord, Method], ParameterCount] = {}


def count_on_meta(model: ModelRecord, method: Method) -> ParameterCount:
    """The parameters of ``model`` with ``method`` attached, counted on ``meta``: no memory, about a second for 70B.

    The base is not quantized here, since packing changes the storage of weights, not their number: QLoRA's are LoRA's.
    """
    from peft_gauge.counting import count

    unquantized = replace(method, quantization=None, prepare_kbit=False)
    key = (model, replace(unquantized, name="", title=""))
    if key not in _counts:
        with no_collector():
            _counts[key] = count(methods.attach(models.build(model, device="meta", as_stored=False), unquantized))
    return _counts[key]
