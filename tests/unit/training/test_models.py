"""Records resolve to what they name, build what they say, and refuse what cannot be built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.weights import stored_base
from peft_gauge import paths
from peft_gauge.errors import GaugeError
from peft_gauge.training import models
from peft_gauge.training.fetch import prepare
from peft_gauge.training.models import construction
from peft_gauge.training.models.config import CONFIG_FILE_LIMIT_BYTES, read_config
from peft_gauge.training.models.records import FETCHED_WEIGHTS

TOY = paths.fixture("models") / "toy-llama" / "config.json"


def toy_config(**changes: Any) -> dict[str, Any]:
    return {**json.loads(TOY.read_text()), **changes}


def folder_with(tmp_path: Path, config: object) -> Path:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", models.record_names())
def test_every_record_passes_the_checks_that_strangers_must(name: str) -> None:
    read_config(paths.fixture("models") / name / "config.json")


def test_70b_on_meta_takes_no_memory() -> None:
    """Its float32 weights are 276 GB: more than this test's machine has, so a build that allocates fails."""
    model = models.build(models.resolve("llama-2-70b"), device="meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model.num_parameters() == 68_976_648_192


def test_the_same_seed_gives_the_same_bytes() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        return models.build(models.resolve("toy-llama", seed=seed)).state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_16_bit_weights_are_the_rounded_float32_ones() -> None:
    record = models.resolve("toy-llama")
    exact, rounded = models.build(record), models.build(record, dtype="bfloat16")
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(exact.lm_head.weight.to(torch.bfloat16), rounded.lm_head.weight)


def test_building_leaves_the_callers_random_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    models.build(models.resolve("toy-llama"))
    assert torch.equal(torch.rand(1), expected)


def test_weights_that_a_gpu_draws_are_planned_and_counted_without_one() -> None:
    record = models.resolve("toy-llama", weights="random-gpu")
    assert record == replace(models.resolve("toy-llama", weights="random"), weights="random-gpu")
    assert models.logical_params(record) == 106_816
    assert models.stored(record, "float32", Path("nowhere")) is record, "they are drawn again, not written"


def test_a_folder_with_config_only_gets_random_weights(tmp_path: Path) -> None:
    record = models.resolve(str(folder_with(tmp_path, toy_config())))
    assert (record.source, record.weights) == ("folder", "random")
    assert models.build(record).num_parameters() == 106_816
    with pytest.raises(GaugeError, match=r"no \.safetensors weights"):
        models.resolve(str(tmp_path), weights="real")


def test_a_folder_with_safetensors_gets_its_own_weights(tmp_path: Path) -> None:
    saved = models.build(models.resolve("toy-llama", seed=7))
    saved.save_pretrained(tmp_path)
    record = models.resolve(str(tmp_path))
    assert record.weights == "real"
    assert torch.equal(models.build(record).lm_head.weight, saved.lm_head.weight)
    assert models.resolve(str(tmp_path), weights="random").weights == "random"


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    models.build(models.resolve("toy-llama")).save_pretrained(tmp_path)
    folder_with(tmp_path, toy_config(num_hidden_layers=3))
    with pytest.raises(GaugeError, match="do not match its config|cannot load the weights"):
        models.build(models.resolve(str(tmp_path)))


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    models.build(models.resolve("toy-llama")).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(GaugeError, match="cannot load the weights"):
        models.build(models.resolve(str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[]", "is not a JSON object"),
        (toy_config(hidden_size=2**40), "hidden_size = 1099511627776 is not a whole number from 1 to"),
        (toy_config(num_hidden_layers=-1), "num_hidden_layers = -1"),
        (toy_config(vocab_size=0), "vocab_size = 0"),
        (toy_config(hidden_size="64"), "hidden_size = '64'"),
        (toy_config(hidden_size=True), "hidden_size = True"),
        ({"model_type": ["llama"]}, "has no model_type"),
        ({"hidden_size": 64}, "has no model_type"),
        (toy_config(num_attention_heads=5), "multiple of (5|the number of) attention heads"),
        (toy_config(num_key_value_heads=3), "not a multiple of 3 key-value heads"),
        (toy_config(model_type="mystery", auto_map={"AutoModel": "x.Y"}), "needs custom code"),
        (toy_config(model_type="mystery"), "model_type 'mystery' is not a causal LM"),
        (toy_config(model_type="vit"), "model_type 'vit' is not a causal LM"),
        (toy_config(model_type="bart", is_encoder_decoder=True), "'bart' is an encoder-decoder model"),
        ({"model_type": "t5"}, "'t5' is an encoder-decoder model"),
        ({"model_type": "roberta"}, r"'roberta' is an encoder \(masked LM\), not a causal LM"),
        (toy_config(model_type="gpt2", n_embd=0), "n_embd = 0 is not a whole number"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 2**40}}, "num_hidden_layers = 1099511627776"),
        ({"model_type": "gemma3", "vision_config": {"hidden_size": 2**40}}, "hidden_size = 1099511627776"),
        (toy_config(rms_norm_eps="small", hidden_act="no such activation"), "cannot be built|is invalid"),
    ],
)
def test_an_unusable_config_is_one_line(config: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match=said) as caught:
        models.build(models.resolve(str(folder_with(tmp_path, config))), device="meta")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_is_read_once_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    reads: list[str | None] = []

    def read(place: str, gguf_file: str | None = None, **options: object) -> object:
        reads.append(gguf_file)
        return object()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", read)
    toy = models.resolve("toy-llama")
    first, second = (replace(toy, weights="real", location=str(tmp_path / name)) for name in ("a.gguf", "b.gguf"))
    assert models.tokenizer(first) is models.tokenizer(replace(first))
    assert models.tokenizer(second) is not models.tokenizer(first)
    assert reads == ["a.gguf", "b.gguf"]
    assert models.tokenizer(toy) is None


def test_a_fetched_tokenizer_is_read_from_its_gguf_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    splits = Tokenizer(kinds.WordLevel({"[UNK]": 0, "bank": 1, "river": 2}, unk_token="[UNK]"))
    splits.pre_tokenizer = pre_tokenizers.Whitespace()
    in_the_file = transformers.PreTrainedTokenizerFast(tokenizer_object=splits, unk_token="[UNK]")
    real, reads = transformers.AutoTokenizer.from_pretrained, []

    def read(place: str, gguf_file: str | None = None, **options: Any) -> object:
        if gguf_file is None:
            return real(place, **options)
        reads.append(gguf_file)
        return in_the_file

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", read)
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path))
    weights = tmp_path / "tiny" / "tiny.gguf"
    weights.parent.mkdir()
    weights.touch()
    record = replace(models.resolve("toy-llama"), weights="real", location=str(weights))
    load: Any = models.tokenizer.__wrapped__  # as in another process
    assert [load(record)("river bank delta")["input_ids"] for _ in range(3)] == [[2, 1, 0]] * 3
    assert reads == ["tiny.gguf"]
    os.utime(weights, (1, 1))  # another file
    load(record)
    assert len(reads) == 2
    moved = weights.rename(tmp_path.parent / "not fetched.gguf")
    assert load(replace(record, location=str(moved))) is in_the_file


def test_a_tokenizer_whose_copy_cannot_be_written_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **given: given["gguf_file"])
    monkeypatch.setattr(construction, "make_once", deny)
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path))
    (tmp_path / "tiny.gguf").touch()
    record = replace(models.resolve("toy-llama"), weights="real", location=str(tmp_path / "tiny.gguf"))
    load: Any = models.tokenizer.__wrapped__
    assert load(record) == "tiny.gguf"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="did you mean tinyllama"):
        models.resolve("tinylama")
    with pytest.raises(GaugeError, match="no config.json in"):
        models.resolve(str(tmp_path))
    with pytest.raises(GaugeError, match="no such model folder"):
        models.resolve("./nowhere/at/all")
    with pytest.raises(GaugeError, match="no such GGUF file"):
        models.resolve("nowhere.gguf")
    with pytest.raises(GaugeError, match="unknown kind of weights 'imaginary'"):
        models.resolve("tinyllama", weights="imaginary")
    with pytest.raises(GaugeError, match="no real weights of tinyllama"):
        models.resolve("tinyllama", weights="real")


def test_a_config_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    folder_with(tmp_path, " " * (CONFIG_FILE_LIMIT_BYTES + 1))
    with pytest.raises(GaugeError, match="too large for a config"):
        models.resolve(str(tmp_path))


def test_a_model_larger_than_the_machine_is_refused_before_it_is_built() -> None:
    with pytest.raises(GaugeError, match="of host memory"):
        models.build(models.resolve("llama-2-70b"))


def write_gguf(path: Path, architecture: str) -> Path:
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GaugeError, match="is not a GGUF file that transformers can read"):
        models.resolve(str(write_gguf(tmp_path / "odd.gguf", "whisper")))


def test_a_file_that_only_calls_itself_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(GaugeError, match="is not a GGUF file that transformers can read"):
        models.resolve(str(path))


def test_a_sequence_beyond_the_model_is_refused() -> None:
    record = models.resolve("tinyllama")
    record.check_sequence(2048)
    with pytest.raises(GaugeError, match="2049 tokens exceeds the limit of tinyllama; use --seq 2048"):
        record.check_sequence(2049)


def test_a_hub_id_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GaugeError, match="cannot reach some/model on the hub") as caught:
        models.resolve("some/model")
    assert "\n" not in str(caught.value)


class NoNetwork(Exception):
    pass


@pytest.fixture
def requests_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that reach the hub's library, which has no network."""
    made: list[str] = []

    def fail(url: str, **options: object) -> None:
        made.append(url)
        raise NoNetwork("name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *given: made.append("download"))
    return made


def test_without_network_there_is_one_request_and_no_download(requests_to_the_hub: list[str]) -> None:
    with pytest.raises(
        GaugeError, match=r"cannot reach some/model on the hub \(NoNetwork: name or service not known\)"
    ):
        models.resolve("some/model")
    (url,) = requests_to_the_hub
    assert url.endswith("/some/model/resolve/main/config.json")


def test_without_network_a_config_in_the_cache_is_used(
    requests_to_the_hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(models.resolve("toy-llama", weights="random").config_json)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: str(config))
    assert models.resolve("some/model").config == models.resolve("toy-llama", weights="random").config
    assert len(requests_to_the_hub) == 1


def test_unknown_dtypes_name_the_known() -> None:
    with pytest.raises(GaugeError, match="unknown dtype 'float23'; did you mean float32"):
        models.torch_dtype("float23")


# ---- copies that load in a moment ----------------------------------------------------------------------------------


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> models.ModelRecord:
    """A record with a GGUF in the cache, that is read as the toy model is drawn; how often, stands beside it."""
    monkeypatch.setenv("PEFT_GAUGE_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "cache" / "smollm2-135m" / FETCHED_WEIGHTS["smollm2-135m"]
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"a GGUF")
    toy, really = models.resolve("toy-llama"), models.build

    def build(record: models.ModelRecord, *, dtype: str) -> object:
        reads = tmp_path / "reads"
        reads.write_text((reads.read_text() if reads.exists() else "") + "x")
        return really(toy, dtype=dtype)

    record = replace(toy, weights="real", location=str(gguf))
    monkeypatch.setattr(
        construction, "build", lambda given, **options: (build if given == record else really)(given, **options)
    )
    return record


def test_fetched_weights_are_dequantized_once(fetched: models.ModelRecord, tmp_path: Path) -> None:
    copies = [models.kept(fetched, "float32") for _ in range(2)]

    assert copies[0] == copies[1] != fetched
    assert (tmp_path / "reads").read_text() == "x"
    drawn, loaded = (models.build(each) for each in (models.resolve("toy-llama"), copies[0]))
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), loaded.parameters(), strict=True))
    assert sorted(path.name for path in Path(fetched.location or "").parent.iterdir()) == sorted(
        [Path(each.location or "").name for each in (fetched, copies[0])]
    )


def test_a_copy_is_of_one_file_one_dtype_and_one_transformers(
    fetched: models.ModelRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = Path(fetched.location or "")
    first = models.kept(fetched, "float32")
    other_dtype = models.kept(fetched, "bfloat16")
    os.utime(gguf, (1, 1))
    other_file = models.kept(fetched, "float32")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.0.0")
    other_release = models.kept(fetched, "float32")

    copies = [Path(each.location or "") for each in (first, other_dtype, other_file, other_release)]
    assert len(set(copies)) == 4
    assert [copy.is_dir() for copy in copies] == [False, True, True, True], "the oldest of four goes"


def test_only_what_was_fetched_is_copied(fetched: models.ModelRecord, tmp_path: Path) -> None:
    elsewhere = replace(fetched, location=str(tmp_path / "own.gguf"))
    drawn = models.resolve("toy-llama")
    assert models.kept(elsewhere, "float32") == elsewhere
    assert models.kept(drawn, "float32") == drawn


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    fetched: models.ModelRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "kept", full)
    elsewhere = stored_base(fetched, "float32")
    assert Path(elsewhere.location or "", "model.safetensors").is_file()
    assert not Path(elsewhere.location or "").is_relative_to(paths.cache())
    with pytest.raises(GaugeError, match="No space left on device.*PEFT_GAUGE_CACHE"):
        prepare(Path(fetched.location or ""))


@pytest.mark.slow
@pytest.mark.integration
def test_nothing_is_imported_while_meta_is_the_default_device() -> None:
    """A module's own tensors would be without data for good, and torch 2.6 cannot import its compiler so."""
    code = """if True:
        import sys
        import torch
        from peft_gauge.training import models

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name.startswith(("torch._dynamo", "transformers.models")) and torch.empty(0).is_meta:
                    print(name)

        record = models.resolve("toy-llama")
        sys.meta_path.insert(0, Finder)
        models.build(record, device="meta")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
