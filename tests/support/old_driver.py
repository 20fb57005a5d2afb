"""A pytest plugin: a machine whose driver runs CUDA 11.4, under a torch for CUDA 12.8 that says so."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.integration import test_gpu_bad_input as invented


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before the suite looks for a GPU."""
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "pynvml", invented.nvml_stand_in(invented.CARDS, cuda=11040))
    patch.setattr(torch.version, "cuda", "12.8")
    patch.setattr(torch.cuda, "is_available", invented.answer(available=False, says=invented.TOO_OLD))
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    invented.forget()

    def undo() -> None:
        patch.undo()
        invented.forget()

    early_config.add_cleanup(undo)
