"""A case: one model × method × shape on one device, as data, and the training job that is built from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from peft_gauge.training import methods, models
from peft_gauge.training.step import StepSettings, TrainingJob

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from peft_gauge.counting import ParameterCount
    from peft_gauge.training.methods import Method
    from peft_gauge.training.models import ModelRecord

BATCHES = 4
"""How many different batches a job trains on in turn."""


@dataclass(frozen=True)
class Case:
    """What is built and measured; two equal cases take the same steps over the same bytes.

    ``dtype`` is that of the base weights and of a quantized base's arithmetic; ``seed`` draws random weights,
    adapters and, where the model has no tokenizer, token ids; ``attention`` as `models.build` takes it.
    """

    model: ModelRecord
    method: Method
    settings: StepSettings
    device: str
    dtype: str
    seed: int = 0
    attention: str | None = None

    @property
    def id(self) -> str:
        """The case's name in test ids and tables."""
        checkpointing = "-checkpointing" if self.settings.grad_checkpointing else ""
        return f"{self.method.name}{checkpointing}-{self.model.name.replace('/', '--')}-{self.device}"


def build_job(
    case: Case, *, base: PreTrainedModel | None = None, prepared: bool = False, stream: Tensor | None = None
) -> TrainingJob:
    """The training job of ``case``, on its device.

    ``base``: a freshly built base model to use up; with ``prepared`` it has gone through `methods.prepare_base`
    already. ``stream``: the token ids to train on, of one dimension, where the caller has them.
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
    model = methods.attach(
        base, method, grad_checkpointing=settings.grad_checkpointing, seed=case.seed, device=case.device
    )
    model.to(case.device)  # a new adapter is made where PEFT makes it
    if stream is None:
        needed = BATCHES * settings.batch * settings.seq
        stream = token_stream(models.tokenizer(case.model), vocab_size=vocab_size, tokens=needed, seed=case.seed)
    data = cut(stream, batch=settings.batch, seq=settings.seq, device=case.device)
    # Dropout draws from the global stream; the same seed gives every run of a case the same masks.
    torch.manual_seed(case.seed)
    return TrainingJob(model, data, settings)


def described(case: Case, job: TrainingJob) -> dict[str, Any]:
    """What a metric of ``case`` is a metric of: names, and every setting that changes the outcome, read back from
    what was built."""
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


@cache
def count_on_meta(model: ModelRecord, method: Method) -> ParameterCount:
    """The parameters of ``model`` with ``method`` attached, counted on ``meta``: no memory, a second or so for 70B.

    A quantized base is left unquantized here: packing changes how weights are stored, not how many there are.
    """
    from peft_gauge.counting import count

    unquantized = replace(method, quantization=None, prepare_kbit=False)
    return count(methods.attach(models.build(model, device="meta", as_stored=False), unquantized))
