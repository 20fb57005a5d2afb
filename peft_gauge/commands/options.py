"""Options with one meaning in several commands. Typer reads them at run time, so this module imports nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

AnyModel = Annotated[str, typer.Option(help="Name of a model record, folder, GGUF file or Hub id.")]
Batch = Annotated[int | None, typer.Option(help="Micro-batch size (default: 1 on cpu, 4 on cuda).")]
Seq = Annotated[int | None, typer.Option(help="Sequence length in tokens (default: 64 on cpu, 768 on cuda).")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda if available).")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16: of base weights and compute (default: float32 on cpu, bfloat16 on cuda)."
    ),
]
MixedPrecision = Annotated[
    str | None,
    typer.Option(
        help="no, bf16 or fp16: run forward under autocast, with loss scaling for fp16 (default: no, or the trainer's)."
    ),
]
Loop = Annotated[
    str, typer.Option(help="plain: this suite's step; trainer: transformers.Trainer; sft: trl.SFTTrainer.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An argument of the trainer; repeatable; needs --loop."),
]
Threads = Annotated[int, typer.Option(help="CPU threads per side.")]
