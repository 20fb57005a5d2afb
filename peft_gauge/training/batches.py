"""The batches that every method trains on: the same tokens, in the same order."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_gauge import paths
from peft_gauge.errors import GaugeError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]


def chat_examples() -> Dataset:
    """The shared chat-style dataset: 100 rows with the columns ``prompt`` and ``response``."""
    from datasets import Dataset

    lines = paths.fixture("texts/chat.jsonl").read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def batches(
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    batch: int,
    seq: int,
    number: int = 4,
    seed: int = 0,
    device: str = "cpu",
) -> list[Batch]:
    """``number`` batches of ``input_ids`` and ``labels``, each int64 of shape (``batch``, ``seq``), on ``device``.

    With a tokenizer, the chat examples are tokenized, joined, repeated as needed and cut into rows without padding.
    Without one, ids are drawn uniformly from ``vocab_size`` with ``seed``. Both have the same shape.
    """
    if number < 1:
        raise GaugeError(f"number of batches must be at least 1, got {number}")
    stream = token_stream(tokenizer, vocab_size=vocab_size, tokens=number * batch * seq, seed=seed)
    return cut(stream, batch=batch, seq=seq, device=device)


def token_stream(tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, tokens: int, seed: int = 0) -> Tensor:
    """``tokens`` token ids, int64 of one dimension: the stream that `batches` cuts into rows."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocab_size, (tokens,), generator=generator)
    stream = torch.tensor(_tokenised(tokenizer))
    return stream.repeat(-(-tokens // len(stream)))[:tokens]


def cut(stream: Tensor, *, batch: int, seq: int, device: str = "cpu") -> list[Batch]:
    """All whole batches of ``batch`` × ``seq`` tokens in ``stream``; the remainder is dropped."""
    if batch < 1 or seq < 2:
        raise GaugeError(f"a batch needs at least 1 row of 2 tokens, got {batch} × {seq}")
    number = len(stream) // (batch * seq)
    rows = stream[: number * batch * seq].view(number, batch, seq).to(device)
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def _tokenised(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    stream: list[int] = []
    for example in chat_examples():
        if tokenizer.chat_template:
            turns = [
                {"role": "user", "content": example["prompt"]},
                {"role": "assistant", "content": example["response"]},
            ]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        else:
            text = f"{example['prompt']}\n{example['response']}\n{tokenizer.eos_token or ''}"
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
    return stream
