"""How many parameters does each method train, exactly, and what share of the model is that?

The counts come from the library's own modules, built on ``meta``, and are compared with closed formulas from the
papers, written here independently of the counting code. The same count is then taken from the model that is actually
built, 4-bit weights included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge.training import methods, models
from peft_gauge.training.cases import count_on_meta

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.measured import Measured

ARCHITECTURES = ("tinyllama", "llama-2-7b", "llama-2-13b", "llama-2-70b", "smollm2-135m")

# Parameter counts of the base models as published.
PUBLISHED_PARAMS = {
    "tinyllama": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "smollm2-135m": 134_515_008,
}


class Llama:
    """The sizes of a Llama, by the letters of the papers: d width, k key-value width, f feed-forward width."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.d = config["hidden_size"]
        self.f = config["intermediate_size"]
        self.blocks = config["num_hidden_layers"]
        self.vocab = config["vocab_size"]
        self.k = self.d // config["num_attention_heads"] * config["num_key_value_heads"]
        self.embeddings = 1 if config["tie_word_embeddings"] else 2

    def params(self) -> int:
        attention = 2 * self.d * self.d + 2 * self.d * self.k
        feed_forward = 3 * self.d * self.f
        norms = 2 * self.d
        return self.embeddings * self.vocab * self.d + self.blocks * (attention + feed_forward + norms) + self.d

    def lora(self, rank: int) -> int:
        """r·(in + out) for each of q, k, v, o (Hu et al. 2021, section 4.2)."""
        q = o = rank * (self.d + self.d)
        k = v = rank * (self.d + self.k)
        return self.blocks * (q + k + v + o)

    def bottleneck(self, reduction: int, adapters_a_block: int) -> int:
        """2md + d + m for each adapter (Houlsby et al. 2019, section 2.1)."""
        m = self.d // reduction
        return self.blocks * adapters_a_block * (2 * m * self.d + self.d + m)

    def prefix(self, length: int) -> int:
        """A key and a value of the key-value width for each virtual token and block (Li and Liang 2021)."""
        return 2 * self.blocks * self.k * length

    def prompt(self, length: int) -> int:
        """One embedding for each virtual token (Lester et al. 2021)."""
        return length * self.d

    def ia3(self) -> int:
        """A scale for each key, each value and each input of the down-projection (Liu et al. 2022, section 3.3)."""
        return self.blocks * (self.k + self.k + self.f)


FORMULAS: dict[str, Callable[[Llama], int]] = {
    "full": lambda llama: llama.params(),
    "lora": lambda llama: llama.lora(rank=16),
    "qlora": lambda llama: llama.lora(rank=16),
    "bottleneck": lambda llama: llama.bottleneck(reduction=16, adapters_a_block=2),
    "prefix": lambda llama: llama.prefix(length=20),
    "prompt": lambda llama: llama.prompt(length=20),
    "ia3": lambda llama: llama.ia3(),
}


@pytest.mark.untimed
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_params(architecture: str, record: Callable[..., None]) -> None:
    model = models.resolve(architecture, weights="random")

    counted = models.logical_params(model)

    record(model=architecture, base_params=counted)
    assert counted == PUBLISHED_PARAMS[architecture] == Llama(model.config).params()


@pytest.mark.untimed
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", methods.DEFAULT_METHODS, ids=lambda method: method.name)
def test_trainable_params(method: methods.Method, architecture: str, record: Callable[..., None]) -> None:
    model = models.resolve(architecture, weights="random")

    counted = count_on_meta(model, method)

    base_params = models.logical_params(model)
    record(
        architecture=architecture,
        trained_by=method.name,
        trainable_params=counted.trainable_params,
        total_params=counted.total_params,
        percent_of_base=counted.percent_of_base(base_params),
        percent_of_total=counted.percent_of_total,
    )
    assert counted.trainable_params == FORMULAS[method.name](Llama(model.config))
    added = 0 if method.kind == "full" else counted.trainable_params
    assert counted.total_params == base_params + added


@pytest.mark.measures
@pytest.mark.quick
def test_params_of_the_built_model(measured: Measured, record: Callable[..., None]) -> None:
    built = measured.metrics["counted"]

    record(**built)
    planned = count_on_meta(measured.case.model, measured.case.method)
    assert (built["trainable_params"], built["total_params"]) == (planned.trainable_params, planned.total_params)
