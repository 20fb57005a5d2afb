"""Steps of `transformers.Trainer` and `trl.SFTTrainer`, unmodified: ``train()`` runs, and a listener follows its step.

Only public parts of the trainers are used: their arguments, a callback, ``compute_loss`` and ``accelerator.backward``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from unittest.mock import patch

from peft_gauge._internals.transformers import mark_loaded
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.memory.categories import BACKWARD, FORWARD
from peft_gauge.training.precision import check_mixed_precision
from peft_gauge.training.settings import StepSettings, check_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import Trainer, TrainingArguments

    from peft_gauge.training.loops import Loop
    from peft_gauge.training.methods import Method

OPTIM = {
    "adamw": "adamw_torch",
    "adamw-fused": "adamw_torch_fused",
    "adamw8bit": "adamw_bnb_8bit",
    "paged-adamw8bit": "paged_adamw_8bit",
}
"""This suite's optimizers -> their names in ``TrainingArguments.optim``."""

# Arguments without an effect on a step that would write files, open connections or draw progress bars.
_QUIET = {
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "dataloader_num_workers": 0,
}
_OURS = frozenset({*_QUIET, "use_cpu", "output_dir", "max_steps"})

SEVERAL_GPUS = "several GPUs are not planned"
EVERY_LABEL = "in a plan every token has a label, which needs the most"
NOT_PLANNED = {
    "deepspeed": "several GPUs and offloading are not planned",
    "fsdp": SEVERAL_GPUS,
    "fsdp_config": SEVERAL_GPUS,
    "parallelism_config": SEVERAL_GPUS,
    "torch_compile": "compiled steps are not planned; they usually need less",
    "torch_compile_backend": "compiled steps are not planned",
    "torch_compile_mode": "compiled steps are not planned",
    "use_liger_kernel": "Liger's fused kernels, which need less, are planned where liger-kernel is installed",
    "liger_kernel_config": "Liger's fused kernels are planned where liger-kernel is installed",
    "model_init_kwargs": "the model is built from its config, without kernels from the Hub (use_kernels)",
    "completion_only_loss": EVERY_LABEL,
    "assistant_only_loss": EVERY_LABEL,
}
"""Arguments that a plan leaves out, and why; of Liger's, only if it is missing."""
OF_LIGER = ("use_liger_kernel", "liger_kernel_config")

SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "bf16",
    "fp16",
    "optim",
    "max_grad_norm",
)
"""Arguments that set fields of `StepSettings` on which memory depends."""

_IN_SETTINGS = frozenset({*SETTINGS, "learning_rate", "max_length"})


class Listener(Protocol):
    """Follows a trainer's steps. ``phase`` is entered around a micro-batch's forward and its backward."""

    def phase(self, name: str) -> AbstractContextManager[None]: ...

    def loss_computed(self, loss: Tensor) -> None:
        """The loss of a micro-batch, at the end of its forward."""

    def step_begins(self, number: int, optimizer: Optimizer) -> None:
        """Before step ``number``, counted from 1."""

    def updated(self, number: int) -> None:
        """Right after the optimizer's update, with the gradients still there."""

    def step_ended(self, number: int) -> None:
        """After the gradients were dropped."""


def arguments(
    loop: Loop, given: Mapping[str, Any], folder: Path | None = None, device: str = "cpu"
) -> TrainingArguments:
    """The loop's ``TrainingArguments`` (``SFTConfig`` for ``sft``) with ``given`` values, and its own defaults else.

    ``folder``: for files of the trainer, which writes none of its own accord. ``device``: on which it trains; steps are
    planned on the CPU.

    Raises `GaugeError` for an unknown name, an invalid value, or a missing library.
    """
    kind = _config_class(loop)
    for name in given:
        if name not in kind.__dataclass_fields__:
            raise GaugeError(f"{kind.__name__} has no argument {name!r}")
    values = {name: value for name, value in given.items() if name not in _OURS}
    values |= {**_QUIET, "use_cpu": device == "cpu"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that a later release will drop
            found: TrainingArguments = kind(output_dir=str(folder or "unused"), **values)
    except (ValueError, TypeError, ImportError) as error:
        raise GaugeError(f"{kind.__name__} refuses these arguments: {one_line(error)}") from error
    return found


def config_fields(loop: Loop) -> dict[str, Any]:
    """The names of the loop's arguments, each with its default."""
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(_config_class(loop))
    }


def arguments_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's arguments for fields of `StepSettings`; a field that is absent is left to the trainer."""
    precision = options.get("mixed_precision")
    if precision is not None:
        check_mixed_precision(precision)
    names = {
        "batch": "per_device_train_batch_size",
        "grad_accumulation": "gradient_accumulation_steps",
        "grad_checkpointing": "gradient_checkpointing",
        "clip_grad_norm": "max_grad_norm",
        "learning_rate": "learning_rate",
    }
    found = {theirs: options[ours] for ours, theirs in names.items() if ours in options}
    if "optimizer" in options:
        check_optimizer(options["optimizer"])
        found["optim"] = OPTIM.get(options["optimizer"], options["optimizer"])
    if precision is not None:
        found |= {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    return found


def step_settings(loop: Loop, given: Mapping[str, Any], seq: int) -> tuple[StepSettings, dict[str, Any]]:
    """The settings of a step with ``given`` arguments of ``loop``, its own defaults else; and the given arguments that
    `StepSettings` has no field for.

    ``seq``: tokens in a row, unless ``max_length`` is given. Raises `GaugeError` as `arguments`.
    """
    found: Any = arguments(loop, given)
    optim = str(getattr(found.optim, "value", found.optim))
    settings = StepSettings(
        batch=found.per_device_train_batch_size,
        seq=given.get("max_length") or seq,
        learning_rate=found.learning_rate,
        optimizer=next((ours for ours, theirs in OPTIM.items() if theirs == optim), optim),
        grad_checkpointing=found.gradient_checkpointing,
        grad_accumulation=found.gradient_accumulation_steps,
        clip_grad_norm=found.max_grad_norm or None,
        mixed_precision="bf16" if found.bf16 else "fp16" if found.fp16 else "no",
    )
    return settings, {name: value for name, value in given.items() if name not in _IN_SETTINGS}


def _config_class(loop: Loop) -> Any:
    from peft_gauge.training.quantization import import_peft

    import_peft()  # before these import it
    if loop == "trainer":
        from transformers import TrainingArguments

        return TrainingArguments
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise GaugeError(f"--loop sft needs trl ({one_line(error)}); run: pip install trl") from error
    return SFTConfig


@contextlib.contextmanager
def alone() -> Iterator[Path]:
    """Around one trainer, with a folder for its files. accelerate's state is global, so that a second trainer would
    take over the first one's; and TRL reports its use to a server as it is built."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from huggingface_hub import constants

    variables = {"HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with patch.dict(os.environ, variables), patch.object(constants, "HF_HUB_DISABLE_TELEMETRY", True):
        try:
            with tempfile.TemporaryDirectory(prefix="peft-gauge-trainer-") as folder:
                yield Path(folder)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            PartialState._reset_state()
            if "bitsandbytes" in sys.modules:  # a trainer registers there that embeddings have 32-bit states
                sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()


def build(
    loop: Loop,
    model: nn.Module,
    settings: TrainingArguments,
    *,
    steps: int,
    seq: int,
    rows: Sequence[Sequence[int]] | None = None,
) -> Trainer:
    """The trainer of ``model`` for ``steps`` steps over rows of ``seq`` tokens.

    Args:
        model: with its adapters, on the trainer's device.
        settings: from `arguments`.
        rows: token ids to train on, in turn (default: the same few ids in every row).

    For ``sft`` the rows go through TRL's own preparation: packing, the labels, its collator. A trainer has its
    collator in ``data_collator``. Raises `GaugeError` if the trainer refuses the model or the settings.
    """
    settings.max_steps = steps
    number = min(steps, EPOCH_STEPS) * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    rows = rows or [list(_TOKENS) * (seq // len(_TOKENS)) + [2] * (seq % 2)] * min(number, 64)
    try:
        if loop == "trainer":
            return _trainer(model, settings, rows, number)
        return _sft_trainer(model, settings, rows, number, seq)
    except (ValueError, TypeError, RuntimeError) as error:
        raise GaugeError(f"the trainer refuses this: {one_line(error)}") from error


EPOCH_STEPS = 4096
"""Most steps in an epoch: a trainer draws the order of all its rows."""


def _trainer(model: nn.Module, settings: TrainingArguments, rows: Sequence[Sequence[int]], number: int) -> Trainer:
    from transformers import Trainer

    prepared = [{"input_ids": list(row), "labels": list(row)} for row in rows]
    return Trainer(model=model, args=settings, train_dataset=Repeated(prepared, number))


def _sft_trainer(model: nn.Module, settings: Any, rows: Sequence[Sequence[int]], number: int, seq: int) -> Trainer:
    from datasets import Dataset, disable_progress_bars
    from trl import SFTTrainer

    disable_progress_bars()
    settings.max_length = seq
    data = Dataset.from_dict({"input_ids": [list(row) for row in rows]})
    found: Trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=_tokenizer())
    found.train_dataset = Repeated(list(found.train_dataset), number)
    return found


_TOKENS = (2, 3)  # neither padding nor the end of a text


def _tokenizer() -> Any:
    """A tokenizer that gives `SFTTrainer` special tokens; the rows are tokenized already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), eos_token="</s>", pad_token="<pad>"
    )


def mark_quantized(model: nn.Module, method: Method) -> None:
    """Mark the base of ``model``, if ``method`` quantizes it, as transformers does: trainers ask how it was loaded."""
    quantization = method.quantization
    if quantization is None:
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    mark_loaded(base, quantization.quant_format, double_quant=quantization.double_quant)


def run(trainer: Trainer, listener: Listener) -> None:
    """Call ``trainer.train()``, followed by ``listener``. What the listener raises ends the run."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            listener.step_begins(state.global_step + 1, trainer.optimizer)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            listener.updated(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            listener.step_ended(state.global_step)

    trainer.add_callback(Steps())
    compute_loss = trainer.compute_loss

    def told_loss(*args: Any, **kwargs: Any) -> Any:
        found = compute_loss(*args, **kwargs)
        listener.loss_computed(found[0] if isinstance(found, tuple) else found)
        return found

    trainer.compute_loss = _within(listener, FORWARD, told_loss)
    accelerator: Any = trainer.accelerator
    accelerator.backward = _within(listener, BACKWARD, accelerator.backward)
    trainer.train()


def _within(listener: Listener, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with listener.phase(phase):
            return function(*args, **kwargs)

    return call


class Repeated:
    """A dataset of ``number`` rows that repeats ``rows``, which a trainer's collator accepts."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], number: int) -> None:
        self.rows = rows
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index % len(self.rows)])
