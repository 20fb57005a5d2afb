"""Every PEFT type, planned on shapes alone against the same step on real tensors: parameters exact, bytes equal."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from peft_gauge.errors import GaugeError
from peft_gauge.memory.categories import BACKWARD, BASE_WEIGHTS, BUFFERS, FORWARD, INPUTS, OPTIMIZER
from peft_gauge.memory.tracker import StorageTracker
from peft_gauge.plan import fakes, kernels, policies
from peft_gauge.plan.policies import answers
from peft_gauge.training import methods, models
from peft_gauge.training.settings import StepSettings
from peft_gauge.training.step import TrainingJob

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BATCH, SEQ = 2, 24
TARGETS = ["q_proj", "v_proj"]
TOY = models.resolve("toy-llama")


@dataclass(frozen=True)
class Row:
    """A config; the policies that must be named, and no others; what keeps real and planned bytes apart."""

    config: dict[str, Any]
    policies: tuple[str, ...] = ()
    dtype: str = "float32"
    tolerance_bytes: int = 0


def row(peft_type: Any, *named: Any, dtype: Any = "float32", tolerance_bytes: Any = 0, **settings: Any) -> Any:
    return Row({"peft_type": peft_type, **settings}, named, dtype, tolerance_bytes)


def on(peft_type: Any, *named: Any, **settings: Any) -> Any:
    return row(peft_type, *named, target_modules=TARGETS, **settings)


VIRTUAL = {"num_virtual_tokens": 4}
TABLE = {
    "lora": on("LORA", r=4),
    "lora-dora": on("LORA", r=4, use_dora=True),
    "lora-rslora": on("LORA", r=4, use_rslora=True, lora_dropout=0.1),
    "lora-gaussian": on("LORA", r=4, init_lora_weights="gaussian"),
    "lora-orthogonal": on("LORA", r=4, init_lora_weights="orthogonal"),
    "lora-pissa": on("LORA", "PiSSA initialisation", r=4, init_lora_weights="pissa"),
    "lora-olora": on("LORA", "OLoRA initialisation", r=4, init_lora_weights="olora"),
    "lora-mica": on("LORA", "MiCA initialisation", r=4, init_lora_weights="mica"),
    "lora-eva": on("LORA", r=4, init_lora_weights="eva", eva_config={"rho": 1.0}),
    "lora-ga": on("LORA", r=4, init_lora_weights="lora_ga", lora_ga_config={}),
    "lora-replicated": on("LORA", r=4, layer_replication=[[0, 2], [1, 2]]),
    "lora-head-saved": on("LORA", r=4, modules_to_save=["lm_head"]),
    "lora-tokens": on("LORA", r=4, trainable_token_indices=[1, 5]),
    "lora-bias": on("LORA", r=4, bias="all", lora_bias=True),
    "lora-embedding": row("LORA", r=4, target_modules=["embed_tokens", "q_proj"]),
    "lora-parameters": row("LORA", r=4, target_modules=[], target_parameters=["q_proj.weight"]),
    "lora-velora": on("LORA", "_normalize_projection", r=4, velora_config={}),
    "lora-monteclora": on("LORA", "MonteCLoRA's samples", "boolean value", r=4, monteclora_config={"buffer_size": 5}),
    "lora-kasa": on("LORA", "KaSA's truncation", r=4, kasa_config={}),
    "lora-qalora": on("LORA", r=4, use_qalora=True),
    "lora-alora": on("LORA", "aLoRA's invocation", "positions", r=4, alora_invocation_tokens=[3, 4]),
    # A base in float32 on the CPU is the only one that leaves the rank counters frozen.
    "adalora": on("ADALORA", "rank counters", dtype="bfloat16", init_r=6, target_r=4, total_step=9),
    "adaption-prompt": row("ADAPTION_PROMPT", adapter_len=4, adapter_layers=1),
    "beft": on("BEFT"),
    "boft": on("BOFT", boft_block_size=4),
    "boft-dropout": on("BOFT", "boft", boft_block_size=4, boft_n_butterfly_factor=2, boft_dropout=0.1),
    "c3a": on("C3A", block_size=16),
    "cartridge": row("CARTRIDGE", num_virtual_tokens=6),
    # The hook on the gradient holds a real mask of one byte a token.
    "cpt": row(
        "CPT",
        "get_projection",
        "_cpt_forward",
        "calculate_loss",
        dtype="bfloat16",
        tolerance_bytes=4,
        cpt_token_ids=[1, 2, 3, 4],
        cpt_mask=[1] * 4,
        cpt_tokens_type_mask=[1, 2, 3, 4],
    ),
    "deft": on("DEFT", r=4),
    "deft-qr": on("DEFT", r=4, decomposition_method="qr"),
    "delora": on("DELORA", r=4),
    "fourierft": on("FOURIERFT", "positions", n_frequency=50),
    "frod": on("FROD", "FRoD's joint decomposition", progressbar=False),
    "frod-16-bit": on("FROD", "FRoD's joint decomposition", dtype="bfloat16", progressbar=False),
    "glora": on("GLORA", r=4),
    "gralora": on("GRALORA", r=4),
    "hira": on("HIRA", r=4),
    "hra": on("HRA", r=4),
    "ia3": row("IA3"),
    "lily": on("LILY", r=4),
    "ln-tuning": row("LN_TUNING"),
    "loha": on("LOHA", "module_dropout", r=4),
    "lokr": on("LOKR", "module_dropout", r=2, decompose_both=True, decompose_factor=4, rank_dropout=0.1),
    "miss": on("MISS", r=4),
    "multitask-prompt": row("MULTITASK_PROMPT_TUNING", num_tasks=2, **VIRTUAL),
    "oft": on("OFT", oft_block_size=8),
    "oft-coft": on("OFT", oft_block_size=8, coft=True),
    "oft-exact": on("OFT", oft_block_size=8, use_cayley_neumann=False),
    "osf": on("OSF"),
    "osf-rank": on("OSF", effective_rank=8),
    "p-tuning": row("P_TUNING", encoder_hidden_size=32, **VIRTUAL),
    "p-tuning-lstm": row(
        "P_TUNING", "recurrent", encoder_hidden_size=32, encoder_reparameterization_type="LSTM", **VIRTUAL
    ),
    "peanut": on("PEANUT", r=4),
    "poly": on("POLY", "router", r=4, n_tasks=2, n_skills=2),
    "prefix": row("PREFIX_TUNING", **VIRTUAL),
    "prefix-projection": row("PREFIX_TUNING", prefix_projection=True, encoder_hidden_size=32, **VIRTUAL),
    "prompt": row("PROMPT_TUNING", **VIRTUAL),
    "prompt-vocabulary": row("PROMPT_TUNING", prompt_tuning_init="SAMPLE_VOCAB", **VIRTUAL),
    "psoft": on("PSOFT", r=4),
    "pvera": on("PVERA", r=8),
    "randlora": on("RANDLORA", r=4),
    "randlora-sparse": on("RANDLORA", r=4, sparse=True),
    "road": on("ROAD", group_size=16),
    "shadow": row("SHADOW", r=4),
    "shira": on("SHIRA", "SHiRA's sparse masks", r=4),
    "supertuning": on("SUPERTUNING"),
    "supertuning-lora": on("SUPERTUNING", r=4, lora_alpha=8),
    "tinylora": on("TINYLORA", u=8),
    "trainable-tokens": row("TRAINABLE_TOKENS", token_indices=[1, 5]),
    "unilora": on("UNILORA"),
    "vblora": on("VBLORA", "vblora", vector_length=16, num_vectors=32),
    "vera": on("VERA", r=8),
    "waveft": on("WAVEFT", "waveft", "positions", n_frequency=50),
    "xlora": row("XLORA", hidden_size=64, xlora_size=16, adapters={"0": "saved", "1": "saved"}),
}
PLAIN = ("lora", "ia3", "p-tuning", "prefix", "prompt", "ln-tuning", "lora-tokens", "oft", "road", "vera", "xlora")
"""Of the rows that need no policy, those of every day: weights, virtual tokens, rotations and what is shared."""
REPEATED = {name for name, row in TABLE.items() if not row.policies and name not in PLAIN}
"""Rows that no code of this project's own is for: these are slow, and run every week."""
WITHOUT_REALITY = {
    "ADAMSS": "needs scikit-learn's k-means; tested on shapes alone below",
}


@dataclass(frozen=True)
class Outcome:
    live_bytes: int
    peak_bytes: dict[str, int]
    kept_bytes: int


def trace(model: Any, mode: Any = None, stepping: Any = None) -> Any:
    """Two steps, the second after the optimizer's state exists; with `mode` on fakes."""
    tracker = StorageTracker()
    if mode is not None:
        fakes.to_fake(model, mode)
    with ExitStack() as stack:
        stack.enter_context(mode or nullcontext())
        if mode is not None:
            stack.enter_context(kernels.unpacked_sequences())
        ids = torch.ones(BATCH, SEQ, dtype=torch.long)
        ids[:, 0], ids[:, 1] = 3, 4
        warnings = [] if stepping is None else stack.enter_context(stepping)
        batch = {"input_ids": ids, "labels": ids.clone(), **policies.extra_inputs(model, BATCH, SEQ)}
        job = TrainingJob(model, [batch], StepSettings(BATCH, SEQ))
        tracker.adopt(model.parameters(), BASE_WEIGHTS)
        tracker.adopt([*model.buffers(), *fakes.plain_tensors(model)], BUFFERS)
        tracker.adopt(batch.values(), INPUTS)
        tracker.follow(job.optimizer)
        with tracker:
            for _ in range(2):
                job.clear()
                with tracker.phase(FORWARD):
                    job.forward()
                with tracker.phase(BACKWARD):
                    job.backward()
                with tracker.phase(OPTIMIZER):
                    job.optimizer_step()
            job.clear()
            live = tracker.live().bytes
    peaks = {phase: tracker.peak(phase).bytes for phase in (FORWARD, BACKWARD, OPTIMIZER)}
    return Outcome(live, peaks, tracker.kept_bytes()), warnings


def tensors_of(model: Any) -> Any:
    parameters = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    return parameters, {name: (b.shape, b.dtype) for name, b in model.named_buffers()}


def as_method(config: Any) -> Any:
    return methods.Method("case", "case", "peft", peft_config={"task_type": "CAUSAL_LM", **config})


def attach_planned(config: Any, dtype: Any = "float32") -> Any:
    method = as_method(config)
    with policies.attaching(method) as warnings:
        model = methods.attach(models.build(TOY, device="meta", dtype=dtype), method)
    return model, warnings


@pytest.fixture
def as_on_cuda(monkeypatch: Any) -> Any:
    """CUDA's layouts and kernels where the CPU's keep other bytes: right singular vectors by rows, LSTM by steps."""
    svd = torch.linalg.svd

    def rows_first(*args: Any, **kwargs: Any) -> Any:
        left, values, right = svd(*args, **kwargs)
        return left, values, right.contiguous()

    monkeypatch.setattr(torch.linalg, "svd", rows_first)
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(scope="module")
def saved_adapter(tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(models.build(TOY), config).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def resolved(saved_adapter: Any) -> Any:
    """A config with the place of the saved adapters filled in."""

    def resolve(config: Any) -> Any:
        if "adapters" in config:
            return {**config, "adapters": dict.fromkeys(config["adapters"], saved_adapter)}
        return config

    return resolve


def skip_if_unknown(config: Any) -> None:
    import peft

    if config["peft_type"] not in list(PeftType):
        pytest.skip(f"this PEFT has no {config['peft_type']}")
    try:
        peft.PeftConfig.from_peft_type(task_type="CAUSAL_LM", **config)
    except TypeError as error:
        pytest.skip(f"this PEFT lacks an option: {error}")


def test_every_type_has_a_row() -> None:
    assert {kind.value for kind in PeftType} <= {row.config["peft_type"] for row in TABLE.values()} | {*WITHOUT_REALITY}


def test_every_policy_has_a_row_of_every_day() -> None:
    quick = {policy for name, row in TABLE.items() if name not in REPEATED for policy in row.policies}
    assert quick == {policy for row in TABLE.values() for policy in row.policies} != set()
    assert {*PLAIN} <= TABLE.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in REPEATED else ()) for name in TABLE]
)
def test_a_plan_is_the_step_it_stands_for(name: Any, as_on_cuda: Any, resolved: Any) -> None:
    case = TABLE[name]
    config = resolved(case.config)
    skip_if_unknown(config)
    base = models.build(TOY, dtype=case.dtype)
    base.config.use_cache = False
    real = methods.attach(base, as_method(config))
    planned, warnings = attach_planned(config, case.dtype)
    assert tensors_of(planned) == tensors_of(real)

    expected, _ = trace(real)
    outcome, in_step = trace(planned, fakes.fake_mode(), policies.stepping(planned))

    assert outcome.live_bytes == pytest.approx(expected.live_bytes, abs=case.tolerance_bytes)
    assert outcome.peak_bytes == pytest.approx(expected.peak_bytes, abs=case.tolerance_bytes)
    said = sorted([*warnings, *in_step])
    for sentence in said:
        assert any(policy in sentence for policy in case.policies), sentence
    for policy in case.policies:
        assert any(policy in sentence for sentence in said), policy


@pytest.mark.parametrize(
    ("init", "settings"),
    [("corda", {"corda_config": {}}), ("loftq", {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}})],
)
def test_an_initialisation_that_needs_more_than_weights_has_loras_shapes(init: Any, settings: Any) -> None:
    plain, _ = attach_planned(TABLE["lora"].config)
    planned, warnings = attach_planned({**TABLE["lora"].config, "init_lora_weights": init, **settings})

    assert tensors_of(planned) == tensors_of(plain)
    assert len(warnings) == 1


@pytest.mark.parametrize("use_asa", [False, True])
def test_adamss_is_planned_without_its_clustering(use_asa: Any) -> None:
    """K subspaces with one row of A (r wide) each, and one B value an output row: K·r + out a layer."""
    config = {"peft_type": "ADAMSS", "target_modules": TARGETS, "r": 16, "num_subspaces": 3, "use_asa": use_asa}
    model, warnings = attach_planned(config)
    outcome, in_step = trace(model, fakes.fake_mode(), policies.stepping(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert trained == 2 * (3 * 16 + 64 + 3 * 16 + 32)
    assert outcome.live_bytes > 0
    assert [*warnings, *in_step] == ["AdaMSS's k-means of the base weights is replaced by clusters of equal size."]


@pytest.mark.parametrize(
    ("config", "copies"),
    [
        (TABLE["adalora"].config, 3),  # the importance of this step, its running mean, its running uncertainty
        ({"peft_type": "ADAMSS", "target_modules": TARGETS, "r": 16, "num_subspaces": 3, "use_asa": True}, 2),
    ],
)
def test_importance_is_among_the_plain_tensors(config: Any, copies: Any) -> None:
    model, _ = attach_planned(config)
    mode = fakes.fake_mode()
    fakes.to_fake(model, mode)
    with mode, policies.stepping(model):
        before = sum(t.nbytes for t in fakes.plain_tensors(model))
        weights = [p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        policies.update_importance(model)
        after = sum(t.nbytes for t in fakes.plain_tensors(model))

    assert after - before == copies * sum(weight.nbytes for weight in weights)


MIXTURE = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_mixture_of_experts_is_planned_as_routed_uniformly(kind: Any, experts: Any) -> Any:
    """Saved activations are linear in tokens an expert, so any routing keeps what the uniform one keeps."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers before 5 cannot choose how experts are computed")
    config = AutoConfig.for_model(kind, **MIXTURE)

    def attached(device: Any) -> Any:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation=experts)
        return methods.attach(base, as_method(TABLE["lora"].config))

    expected, _ = trace(attached("cpu"))
    planned = attached("meta")
    outcome, warnings = trace(planned, fakes.fake_mode(), policies.stepping(planned))

    assert (outcome.live_bytes, outcome.kept_bytes) == (expected.live_bytes, expected.kept_bytes)
    assert any("Uniform routing" in sentence for sentence in warnings) == (experts == "eager")


def test_experts_are_counted_where_the_text_model_has_its_own_config() -> None:
    nested = AutoConfig.for_model("mixtral", **MIXTURE)
    wrapped: Any = type("Config", (), {"get_text_config": lambda _: nested})()
    model: Any = nn.Linear(2, 2)
    model.config = wrapped
    assert answers.experts(model) == 4


def test_virtual_tokens_from_a_text_are_said() -> None:
    config = {**TABLE["prompt"].config, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Hello",
              "tokenizer_name_or_path": "nowhere/at-all"}  # fmt: skip
    plain, _ = attach_planned(TABLE["prompt"].config)
    planned, warnings = attach_planned(config)
    assert tensors_of(planned) == tensors_of(plain)
    assert warnings == ["Virtual tokens are not initialised from TEXT: shapes only."]


# Failing, and leaving no trace


def test_an_operation_that_still_needs_values_is_named() -> None:
    mode = fakes.fake_mode()
    with (
        pytest.raises(policies.CannotPlan, match="repeat_interleave"),
        mode,
        policies.stepping(nn.Linear(2, 2)),
    ):
        torch.repeat_interleave(torch.zeros(3, dtype=torch.long))


def test_an_unknown_types_initialisation_that_needs_values_is_named() -> None:
    with pytest.raises(policies.CannotPlan, match="nonzero"), policies.attaching({"peft_type": "OF_TOMORROW"}):
        torch.empty(3, device="meta").nonzero()


def test_an_attach_that_fails_for_want_of_values_is_named() -> None:
    def attach() -> None:
        try:
            torch.empty(3, device="meta").cpu()
        except NotImplementedError as error:
            raise GaugeError("does not fit") from error

    with pytest.raises(policies.CannotPlan, match="meta"), policies.attaching({"peft_type": "LORA"}):
        attach()


def test_another_failure_is_left_as_it_is() -> None:
    with pytest.raises(GaugeError, match="nothing to train") as caught, policies.attaching({"peft_type": "LORA"}):
        raise GaugeError("nothing to train")
    assert not isinstance(caught.value, policies.CannotPlan)


def test_policies_end_with_their_block() -> None:
    from peft.tuners.lora.layer import LoraLayer
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    original = LoraLayer.pissa_init
    with policies.attaching({"peft_type": "LORA"}):
        assert LoraLayer.pissa_init is not original
    assert LoraLayer.pissa_init is original

    with fakes.fake_mode():
        with policies.stepping(nn.Linear(2, 2)):
            assert torch.zeros(3).nonzero().shape == (3, 1)
        with pytest.raises(DynamicOutputShapeException):
            torch.zeros(3).nonzero()


# What tuners ask of `fakes.to_fake`


def test_gradient_hooks_survive() -> None:
    layer = nn.Linear(2, 2, device="meta")
    layer.weight.register_hook(lambda gradient: gradient * 2)
    mode = fakes.fake_mode()
    fakes.to_fake(layer, mode)
    tracker = StorageTracker()
    with mode, tracker:
        layer(torch.zeros(1, 2)).sum().backward()
    assert [record.operator for record in tracker.records].count("aten::mul") == 1


def test_tensors_in_containers_become_fakes() -> None:
    from torch._subclasses import FakeTensor

    layer: Any = nn.Linear(2, 2, device="meta")
    layer.indices = {"default": torch.zeros(5, dtype=torch.long), "more": [(torch.zeros(3), "text")]}
    fakes.to_fake(layer, fakes.fake_mode())
    found = list(fakes.plain_tensors(layer))

    assert [type(tensor) for tensor in found] == [FakeTensor, FakeTensor]
    assert [tensor.nbytes for tensor in found] == [40, 12]


def test_a_weight_that_is_replaced_lets_its_storage_go() -> None:
    layer = nn.Linear(4, 4, bias=False, device="meta")
    mode, tracker = fakes.fake_mode(), StorageTracker()
    fakes.to_fake(layer, mode)
    tracker.adopt(layer.parameters(), BASE_WEIGHTS)
    with mode, tracker:
        layer.weight.data = torch.zeros(4, 4)
        assert tracker.live().bytes == 64
