"""What the library `adapters` computes with bottleneck adapters in a small Llama, written down for our own to match.

Runs in an environment of its own (`nox -s reference`), for `adapters` needs an older transformers than this project:

    python make_reference.py FOLDER             write the golden files into FOLDER
    python make_reference.py FOLDER --check     compute them anew and compare with those in FOLDER

Everything is float32 on the CPU, without dropout, from seeded weights: a second run gives the same numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import AdapterConfig
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20190202
ADAPTER = "reference"

# Grouped key-value heads, and a hidden size that a reduction factor of 5 does not divide, so that rounding shows.
MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

# Our name of a style: the library's, with the options of the case.
STYLES = {
    "houlsby": ("double_seq_bn", {"reduction_factor": 4, "non_linearity": "swish"}),
    "pfeiffer": ("seq_bn", {"reduction_factor": 5, "non_linearity": "relu"}),
}

# The library's names of the places in a block, and of the parts of an adapter, in plain words.
PLACES = {"attention_adapters": "attention", "output_adapters": "feed_forward"}
PARTS = {"adapter_down.0": "down", "adapter_up": "up"}


def draw_(parameters: dict[str, torch.nn.Parameter], generator: torch.Generator) -> None:
    """Fill ``parameters`` in the order of their names: norms near 1, the rest uniform and large enough to matter."""
    for name in sorted(parameters):
        values = parameters[name].data
        values.uniform_(-0.3, 0.3, generator=generator)
        if "norm" in name:
            values.add_(1.0)


def plain_name(name: str) -> str:
    """``model.layers.0.output_adapters.adapters.reference.adapter_up.bias`` as ``adapter.0.feed_forward.up.bias``."""
    _, _, layer, place, _, _, *part, kind = name.split(".")
    return f"adapter.{layer}.{PLACES[place]}.{PARTS['.'.join(part)]}.{kind}"


def reference(style: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (weights, token ids, logits with and without adapters) and the description of one style's case."""
    library_name, options = STYLES[style]
    generator = torch.Generator().manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, attn_implementation="eager")).eval()
    base = dict(model.named_parameters())
    draw_(base, generator)
    token_ids = torch.randint(MODEL["vocab_size"], (2, 12), generator=generator)
    tensors = {f"base.{name}": parameter.data for name, parameter in base.items()}
    tensors["token_ids"] = token_ids
    with torch.no_grad():
        tensors["base_logits"] = model(token_ids).logits

    adapters.init(model)
    model.add_adapter(ADAPTER, config=AdapterConfig.load(library_name, **options))
    model.train_adapter(ADAPTER)
    model.eval()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    draw_(trainable, generator)
    tensors |= {plain_name(name): parameter.data for name, parameter in trainable.items()}
    with torch.no_grad():
        tensors["logits"] = model(token_ids).logits

    described = {
        "model": json.dumps(MODEL),
        "style": style,
        "reduction_factor": str(options["reduction_factor"]),
        "nonlinearity": str(options["non_linearity"]),
        "trainable_params": str(sum(parameter.numel() for parameter in trainable.values())),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, described


def write(folder: Path) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")}
    for style in STYLES:
        tensors, described = reference(style)
        save_file(tensors, folder / f"{style}.safetensors", {**described, **versions})


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def faults(golden: Path, fresh: Path) -> tuple[list[str], float]:
    """How two golden files differ beyond float32 rounding, and their largest difference in any number."""
    (old, old_described), (new, new_described) = read(golden), read(fresh)
    found = [
        f"{key}: {old_described.get(key)} became {value}"
        for key, value in new_described.items()
        if key != "torch" and old_described.get(key) != value
    ]
    found += [f"{name}: only in one of the two" for name in sorted(old.keys() ^ new.keys())]
    largest = 0.0
    for name in sorted(old.keys() & new.keys()):
        if old[name].shape != new[name].shape:
            found.append(f"{name}: {tuple(old[name].shape)} became {tuple(new[name].shape)}")
            continue
        difference = (old[name].double() - new[name].double()).abs().max().item()
        largest = max(largest, difference)
        if not torch.allclose(old[name], new[name], rtol=1e-5, atol=1e-5):
            found.append(f"{name}: differs by up to {difference:.1e}")
    return found, largest


def check(folder: Path) -> int:
    """Compare the golden files in ``folder`` with fresh ones; one line of result, exit status 1 if they differ."""
    found, largest = [], 0.0
    with tempfile.TemporaryDirectory() as fresh:
        write(Path(fresh))
        for style in STYLES:
            name = f"{style}.safetensors"
            differing, difference = faults(folder / name, Path(fresh) / name)
            found += [f"{name}: {fault}" for fault in differing]
            largest = max(largest, difference)
    if found:
        print(f"reference: DIFFERENT in {len(found)} places, first {found[0]}")
        return 1
    print(f"reference: same, {len(STYLES)} files, largest difference {largest:.1e}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the golden files are, or are to be written")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    # `adapters` warns of an inactive adapter while it activates one; that the adapters act, the tests hold.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    if arguments.check:
        return check(arguments.folder)
    write(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
