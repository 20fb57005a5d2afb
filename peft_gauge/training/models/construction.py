"""Building models from their records, on ``meta``, CPU or CUDA, and keeping copies of their weights."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_gauge import paths
from peft_gauge._internals.transformers import forget_origin
from peft_gauge.errors import GaugeError, one_line
from peft_gauge.files import make_once
from peft_gauge.training.models import hub
from peft_gauge.training.models.architecture import auto_class, check_attention, model_class
from peft_gauge.training.models.defaults import torch_dtype
from peft_gauge.training.models.records import ModelRecord, hf_config
from peft_gauge.training.stored_formats import STORED_FORMAT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build(
    record: ModelRecord,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    as_stored: bool = True,
) -> PreTrainedModel:
    """The model of ``record`` on ``device``, with weights in ``dtype``, quantized if the checkpoint is.

    On ``"meta"`` nothing is allocated (70B takes about a second). Random weights are drawn in float32 on the CPU from
    ``record.seed`` by the architecture's own initialization and then rounded to ``dtype``, so the same seed gives
    the same bytes on every device.

    Args:
        attn_implementation: one of `ATTENTIONS`; ``None`` for sdpa if the architecture supports it, otherwise eager
            (`attention` returns the one in use).
        as_stored: quantize drawn weights if the checkpoint is quantized.

    Raises `GaugeError` if the architecture does not support the attention, if memory is too small, or if the weights do
    not match the architecture.
    """
    import torch

    wanted = torch_dtype(dtype)
    check_attention(record, attn_implementation)
    if device == "meta":
        model_class(record), auto_class(record)  # import now: in a device context torch 2.6 cannot import its compiler
        from peft_gauge._internals.torch import no_initial_values

        with torch.device("meta"), no_initial_values():
            model = _in_dtype(_from_config(record, attn_implementation, wanted), wanted)
        # Flash attention casts float32 activations to this dtype if weights are packed.
        model.config.dtype = model.config.get_text_config().dtype = wanted
        return _as_stored(model, record) if as_stored else model
    check_measurable(record)
    _check_memory(record, wanted)
    if record.weights == "real":
        model = _load(record, wanted, attn_implementation).to(device)
        setattr(model, STORED_FORMAT, record.stored)
        return model
    if record.weights == "random-gpu":
        model = _drawn_on_the_gpu(record, wanted, attn_implementation)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(record.seed)
            model = _in_dtype(_from_config(record, attn_implementation), wanted)
    return (_as_stored(model, record) if as_stored else model).to(device)


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """``model`` in ``dtype``, but for the buffers that a checkpoint does not have (frequencies of rotary embeddings):
    `from_pretrained` leaves them as they were made, in float32."""
    saved = set(model.state_dict())
    kept = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    model = model.to(dtype)
    for name, buffer in kept.items():
        place, _, own = name.rpartition(".")
        setattr(model.get_submodule(place), own, buffer)
    return model


def _drawn_on_the_gpu(record: ModelRecord, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The model on the CPU, with weights drawn on the GPU in ``dtype``; frees the GPU's memory."""
    import torch

    with torch.random.fork_rng(devices=[torch.cuda.current_device()]), torch.device("cuda"):
        torch.cuda.manual_seed(record.seed)
        model = _from_config(record, attn_implementation, dtype)
    model.to("cpu")
    torch.cuda.empty_cache()
    return model


def _as_stored(model: PreTrainedModel, record: ModelRecord) -> PreTrainedModel:
    stored = record.stored
    if stored is not None:
        from peft_gauge.training.stored_layers import store_

        store_(model, stored)
    return model


def check_measurable(record: ModelRecord) -> None:
    """Raise `GaugeError` if the base is stored in a format whose steps can be planned but not measured."""
    stored = record.stored
    if stored is not None and stored.kind != "bitsandbytes":
        needed = "loading them needs" if stored.kind == "dequantized" else "their layers need"
        raise GaugeError(
            f"{record.name} is stored as {stored.title}; such weights can be planned (peft-gauge plan) but not "
            f"measured, because {needed} packages that this project does not require; measure a 16-bit checkpoint"
        )


def stored(record: ModelRecord, dtype: str, folder: Path) -> ModelRecord:
    """Save the weights of ``record`` in ``folder`` as safetensors in ``dtype``, and return a record that loads them.

    This saves time if many processes build the same base, since drawing weights or dequantizing a GGUF file takes
    longer than reading safetensors. A record is returned unchanged if it loads from safetensors already, if its weights
    are quantized, or if they are drawn on the GPU.
    """
    in_safetensors = record.weights == "real" and not str(record.location).endswith(".gguf")
    if in_safetensors or record.weights == "random-gpu" or record.stored is not None:
        return record
    model = build(record, dtype=dtype)
    with without_progress_bars():
        model.save_pretrained(folder)
    return replace(record, source="folder", weights="real", location=str(folder))


KEPT_COPIES = 2
"""The number of copies of each kind to keep of fetched weights, one per release of transformers; older ones are
deleted."""


def kept(record: ModelRecord, dtype: str) -> ModelRecord:
    """`stored`, with a permanent copy next to the GGUF file in the user's cache; other records are returned unchanged.

    A copy belongs to one release of transformers, which dequantizes the weights and names the fields of the config.
    Raises `OSError` if it cannot be written.
    """
    gguf = Path(record.location or "")
    if not _is_fetched(gguf):
        return record
    copy = _kept_copy(gguf, dtype, lambda folder: stored(record, dtype, folder))
    return replace(record, source="folder", location=str(copy))


def _is_fetched(weights: Path) -> bool:
    return weights.suffix == ".gguf" and weights.is_relative_to(paths.cache())


def _kept_copy(gguf: Path, kind: str, fill: Callable[[Path], object]) -> Path:
    """The folder of this kind next to ``gguf``, filled if it is new. Raises `OSError` if it cannot be written."""
    made_by = f"transformers-{metadata.version('transformers')}"
    copy = gguf.with_name(f"{gguf.stem}-{gguf.stat().st_mtime_ns:x}-{kind}-{made_by}")
    if not copy.is_dir():
        make_once(copy, fill)
        copies = gguf.parent.glob(f"{gguf.stem}-*-{kind}-transformers-*")
        for old in sorted(copies, key=lambda each: each.stat().st_mtime)[:-KEPT_COPIES]:
            shutil.rmtree(old, ignore_errors=True)
    return copy


def _from_config(
    record: ModelRecord, attn_implementation: str | None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model in ``dtype``, float32 by default."""
    import torch

    config = hf_config(record)
    text, auto = config.get_text_config(), auto_class(record)
    if model_class(record).config_class is type(text):  # the text model of a multimodal checkpoint, or all of it
        config = text
    try:
        return auto.from_config(config, dtype=dtype or torch.float32, attn_implementation=attn_implementation)
    except Exception as error:  # architectures raise many kinds of errors
        raise GaugeError(f"{record.name} cannot be built from its config: {one_line(error, 200)}") from error


def _load(record: ModelRecord, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    assert record.location is not None, "real weights have a location"
    place, where = _place(record.location)
    if not where:
        where = {"use_safetensors": True}
    # The GGUF reader's progress bar, on stderr, has no switch. Errors are raised as exceptions.
    with _reading(record, "weights") as local_files_only, contextlib.redirect_stderr(io.StringIO()):
        model, report = auto_class(record).from_pretrained(
            place,
            **where,
            dtype=dtype,
            attn_implementation=attn_implementation,
            local_files_only=local_files_only,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise GaugeError(
            f"the weights of {record.name} do not match its config: {len(missing)} are missing, first {missing[0]}"
        )
    if record.location.endswith(".gguf"):
        _forget_gguf(model)
    if record.source != "hub":
        # With a name, saving an adapter would look up the base on the hub, and store this machine's path.
        model.name_or_path = ""
        forget_origin(model.config)
    return model


@contextlib.contextmanager
def _reading(record: ModelRecord, what: str) -> Iterator[bool]:
    """Around a library's reading of ``what`` of ``record``: quiet, and without the hub unless one request reaches it.

    Yields whether only local files may be read. Raises `GaugeError` in place of any exception.
    """
    unreachable = hub.failure(record.location or "") if record.source == "hub" else None
    is_local = record.source != "hub" or unreachable is not None
    try:
        with without_progress_bars(), hub.quiet(), hub.offline() if is_local else contextlib.nullcontext():
            yield is_local
    except Exception as error:  # unreadable, truncated, no safetensors, no network: one line each
        if unreachable is not None:
            raise GaugeError(
                f"cannot reach {record.name} on the hub ({hub.described(unreachable)}), and the cache does not have "
                f"all of its {what}; check the name and the network"
            ) from error
        raise GaugeError(f"cannot load the {what} of {record.name}: {one_line(error, 200)}") from error


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Saving and loading without transformers' progress bars, in the context."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _forget_gguf(model: PreTrainedModel) -> None:
    """Remove the attributes of a quantized model: weights of a GGUF file are dequantized while loading."""
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        model.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)


def _check_memory(record: ModelRecord, dtype: torch.dtype) -> None:
    import psutil

    # Random weights are drawn in float32 and then cast, so all float32 tensors exist at once.
    packed = record.stored is not None and record.weights == "real"
    size = 1 if packed else 4 if record.weights == "random" else dtype.itemsize
    needed_bytes = logical_params(record) * size
    available_bytes = psutil.virtual_memory().available
    if needed_bytes > available_bytes:
        raise GaugeError(
            f"{record.name} needs {needed_bytes / 1e9:.1f} GB of host memory, but only "
            f"{available_bytes / 1e9:.1f} GB are free; use a smaller model, or plan it without measuring"
        )


@cache
def logical_params(record: ModelRecord) -> int:
    """The number of the base model's parameters, tied ones once (built on ``meta``)."""
    return sum(parameter.numel() for parameter in build(record, device="meta", as_stored=False).parameters())


@cache
def tokenizer(record: ModelRecord) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the record's real weights; ``None`` if there is none (random weights).

    It is cached, and of a GGUF file in the user's cache also on disk, since reading it from such a file takes seconds.
    Raises `GaugeError` if it cannot be read.
    """
    from transformers import AutoTokenizer

    if record.weights != "real" or record.location is None:
        return None
    if record.source == "folder" and not any(Path(record.location).glob("tokenizer*")):
        return None
    place, where = _place(record.location)
    with _reading(record, "tokenizer") as local_files_only:
        read = partial(AutoTokenizer.from_pretrained, local_files_only=local_files_only, trust_remote_code=False)
        if _is_fetched(gguf := Path(record.location)):
            with contextlib.suppress(OSError):  # the copy cannot be written or read: read the file itself
                return read(_kept_copy(gguf, "tokenizer", lambda folder: read(place, **where).save_pretrained(folder)))
        return read(place, **where)


def _place(location: str) -> tuple[str, dict[str, Any]]:
    """A checkpoint's folder or Hub id, and the arguments by which transformers finds a GGUF file there."""
    if not location.endswith(".gguf"):
        return location, {}
    path = Path(location)
    return str(path.parent), {"gguf_file": path.name}
