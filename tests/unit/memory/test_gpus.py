"""The table of GPUs, the names and sizes it answers to, and the overheads that a calibration overwrites."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_gauge.errors import GaugeError
from peft_gauge.machine import Accelerator
from peft_gauge.memory import gpus
from peft_gauge.memory.overheads import calibration_path, default_overheads, overheads_for, write_calibration
from peft_gauge.pytest_plugin.workload import gpu_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GIB = 1 << 30


def test_table_covers_8_gb_cards_to_h200() -> None:
    cards = {gpu.name: gpu for gpu in gpus.table()}
    assert len(cards) >= 25
    assert gpus.table()[0].usable_bytes < 8 * GIB
    assert cards["H200"].usable_bytes == 143_156 << 20
    assert cards["GeForce RTX 3070"].usable_bytes == int(7.78 * GIB)


@pytest.mark.parametrize("gpu", gpus.table(), ids=lambda gpu: gpu.name)
def test_each_card_has_a_source_and_a_plausible_size(gpu: gpus.Gpu) -> None:
    """A GPU never reports more than its box says (in GiB), nor less than 90 % of it."""
    assert gpu.source
    assert gpu.url is not None
    assert re.fullmatch(r"https://\S+", gpu.url)
    assert gpu.marketing_memory is not None
    box = int(gpu.marketing_memory.removesuffix(" GB"))
    assert 0.9 * box * GIB < gpu.usable_bytes <= box * GIB
    assert gpu.nominal == (gpu.usable_bytes == box * GIB), "only a metric from a data sheet is a round one"
    assert gpu.compute_capability is not None
    assert (7, 0) <= gpu.compute_capability <= (12, 0)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("GeForce RTX 4090", "GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("rtx-4090", "GeForce RTX 4090"),
        ("4090", "GeForce RTX 4090"),
        ("  h200 ", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada Generation"),
    ],
)
def test_names_as_people_and_drivers_write_them(text: str, name: str) -> None:
    assert gpus.lookup(text).name == name


@pytest.mark.parametrize(
    ("text", "usable_bytes"),
    [
        ("24e9", 24 * 10**9),
        ("24.0GB", 24 * 10**9),
        ("25300MB", 25_300 * 10**6),
        ("24GiB", 24 * 2**30),
        ("1.5gib", 3 * 2**29),
        ("80e9", 80 * 10**9),
        ("17179869184", 2**34),
        ("16384 MiB", 2**34),
        ("9223372036854775807", 2**63 - 1),
        ("2 MiB", 2**21),
    ],
)
def test_sizes(text: str, usable_bytes: int) -> None:
    gpu = gpus.lookup(text)
    assert gpu.usable_bytes == usable_bytes
    assert gpu.compute_capability is None


@pytest.mark.parametrize(
    ("text", "usable_bytes", "like"),
    [
        ("24GB", int(23.52 * GIB), "as GeForce RTX 4090"),  # the middle one of three with ECC and four without
        ("24 gb", int(23.52 * GIB), "as GeForce RTX 4090"),
        ("8GB", int(7.75 * GIB), "as GeForce RTX 4060"),
        ("141GB", 143_156 << 20, "as H200"),
        ("6GB", int(0.97 * 6 * GIB), "97 % of 6 GiB"),  # no GPU of the table
    ],
)
def test_whole_gigabytes_are_a_card_sold_with_them(text: str, usable_bytes: int, like: str) -> None:
    gpu = gpus.lookup(text)
    assert gpu.usable_bytes == usable_bytes
    assert like in gpu.source


@pytest.mark.parametrize(
    ("text", "usable_bytes", "capability"),
    [
        ("17179869184 sm_90", 2**34, (9, 0)),
        ("24 GiB  SM_120", 24 * 2**30, (12, 0)),
        ("141GB sm_90a", 143_156 << 20, (9, 0)),
    ],
)
def test_a_size_can_have_its_compute_capability(text: str, usable_bytes: int, capability: tuple[int, int]) -> None:
    gpu = gpus.lookup(text)
    assert (gpu.usable_bytes, gpu.compute_capability) == (usable_bytes, capability)
    overheads, other = overheads_for(text), overheads_for("17179869184")
    hopper = capability == (9, 0)
    assert (overheads.context_bytes > other.context_bytes) == hopper
    assert (overheads.cublas_workspace_bytes > other.cublas_workspace_bytes) == hopper


@pytest.mark.parametrize(
    ("card", "looked_up"),
    [
        (Accelerator("NVIDIA H200", 150_109_880_320, (9, 0), None), "NVIDIA H200"),
        (Accelerator("NVIDIA H200", 75_000_000_000, (9, 0), None), "75000000000 sm_90"),  # a slice of one
        (Accelerator("Something new", 80_000_000_000, (12, 1), None), "80000000000 sm_121"),
    ],
)
def test_a_measured_card_is_planned_with_what_its_capability_takes(card: Accelerator, looked_up: str) -> None:
    """Else the ceiling of a slice of a Hopper GPU would be too low by 280 MB of context, and its step fail."""
    name = gpu_name(card)
    assert name == looked_up
    assert overheads_for(name).context_bytes == default_overheads(card.compute_capability).context_bytes


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("A100", "nearest: A100 40GB, A100 80GB"),
        ("RTX 4091", "nearest: GeForce RTX 409"),
        ("RTX 3060 Laptop GPU", "nearest: .*GeForce RTX 3060"),
        ("5090 Ti", "nearest: GeForce RTX 5090"),
        ("24G", "unknown GPU '24G'"),
        ("", "unknown GPU ''"),
        ("quantum computer !", "use a name from fixtures/gpus.toml"),
        ("0", "less than 2 MiB"),
        ("0GB", "less than 2 MiB"),
        ("-24GB", "less than 2 MiB"),
        ("24", "less than 2 MiB"),
        ("24 sm_90", "less than 2 MiB"),
        ("A100 sm_80", "nearest: A100 40GB, A100 80GB"),
        ("24GB sm_9", "unknown GPU '24GB sm_9'"),
        ("9223372036854775808", "more than 2\\^63"),
        ("1e400", "more than 2\\^63"),
        ("1e999999999", "more than 2\\^63"),
        ("1e99999999999999999999GB", "more than 2\\^63"),
        ("-1e999999999GB", "less than 2 MiB"),
        ("1e-999999999GB", "less than 2 MiB"),
        ("8388608 TiB", "more than 2\\^63"),
    ],
)
def test_unusable_texts_get_one_line(text: str, complaint: str) -> None:
    with pytest.raises(GaugeError, match=complaint) as failure:
        gpus.lookup(text)
    assert "\n" not in str(failure.value)


@given(
    st.text(max_size=20) | st.from_regex(r"[+-]?[0-9]{1,25}(\.[0-9]*)?(e[+-]?[0-9]{1,12})?[kmgt]?i?b?", fullmatch=True)
)
def test_whatever_is_typed_a_size_in_range_or_one_line_comes_back(text: str) -> None:
    """Any other exception, such as decimal's or an endless conversion, fails the test."""
    try:
        usable_bytes = gpus.lookup(text).usable_bytes
    except GaugeError as error:
        message, usable_bytes = str(error), 2**21
    else:
        message = ""
    assert "\n" not in message
    assert 2**21 <= usable_bytes < 2**63


def test_unknown_unit_is_named_by_parse_bytes() -> None:
    with pytest.raises(GaugeError, match="unknown unit"):
        gpus.parse_bytes("24 parsecs")
    with pytest.raises(GaugeError, match="not a memory size"):
        gpus.parse_bytes("much")


# --- overheads


def test_workspace_defaults_are_those_of_pytorch() -> None:
    """`:4096:2:16:8` means 2 x 4096 KiB + 8 x 16 KiB; compute capability 9.0 alone has 32 MiB; of each, two."""
    assert default_overheads((8, 6)).cublas_workspace_bytes == 2 * 8_519_680
    assert default_overheads((9, 0)).cublas_workspace_bytes == 2 * 33_554_432
    assert default_overheads((10, 0)).cublas_workspace_bytes == 2 * 8_519_680
    assert default_overheads(None).cublaslt_workspace_bytes == 1_048_576


def test_defaults_follow_the_card_and_say_that_the_context_is_an_estimate(tmp_path: Path) -> None:
    overheads = overheads_for("H100", tmp_path)
    assert overheads == default_overheads((9, 0))
    assert overheads.origins["context_bytes"].startswith("measured on an H100 and an H200")
    assert overheads_for("A100 80GB", tmp_path).origins["context_bytes"].startswith("unmeasured estimate")
    assert overheads_for("24GB") == default_overheads(None)


def test_calibration_overrides_under_every_spelling_of_the_card(tmp_path: Path) -> None:
    path = write_calibration(
        tmp_path / "new",
        "NVIDIA H100 80GB HBM3",
        torch_version="2.13.0",
        measured_on="2026-01-31",
        context_bytes=1,
        cublas_workspace_bytes=2,
        cublaslt_workspace_bytes=0,
    )
    assert path.name == "h100-80gb.json"
    overheads = overheads_for("h100", tmp_path / "new")
    assert (overheads.context_bytes, overheads.cublas_workspace_bytes, overheads.cublaslt_workspace_bytes) == (1, 2, 0)
    assert overheads.origins["context_bytes"] == "measured on 2026-01-31 with torch 2.13.0 (h100-80gb.json)"
    assert overheads_for("A100 80GB", tmp_path / "new") == default_overheads((8, 0))


SOUND = {"gpu": "L4", "torch": "2.13.0", "measured_on": "2026-01-31", "context_bytes": 7}


def test_calibration_may_be_partial_and_of_a_card_outside_the_table(tmp_path: Path) -> None:
    calibration_path(tmp_path, "GTX 9999").write_text(json.dumps(SOUND | {"gpu": "GTX-9999"}))
    overheads = overheads_for("GTX 9999", tmp_path)
    assert overheads.context_bytes == 7
    assert overheads.cublas_workspace_bytes == 2 * 8_519_680
    assert overheads.origins["cublas_workspace_bytes"] == "PyTorch's CublasHandlePool.cpp"
    with pytest.raises(GaugeError, match="unknown GPU"):
        overheads_for("GTX 9998", tmp_path)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda r: "{", "Expecting property name"),
        (lambda r: "[]", "not a JSON object"),
        (lambda r: json.dumps(r | {"context_byte": 1}), "unknown field 'context_byte'"),
        (lambda r: json.dumps({k: v for k, v in r.items() if k != "torch"}), "'torch' must be a string"),
        (lambda r: json.dumps(r | {"gpu": "T4"}), "measured on 'T4'"),
        (lambda r: json.dumps(r | {"context_bytes": -1}), "got -1"),
        (lambda r: json.dumps(r | {"context_bytes": 1.5}), "got 1.5"),
        (lambda r: json.dumps(r | {"context_bytes": True}), "got True"),
        (lambda r: json.dumps(r | {"context_bytes": None}), "got None"),
        (lambda r: "\udcff", "codec can't decode"),
    ],
)
def test_broken_calibration_is_one_line_with_the_file(
    tmp_path: Path, spoil: Callable[[dict[str, object]], str], complaint: str
) -> None:
    path = calibration_path(tmp_path, "L4")
    path.write_bytes(spoil(dict(SOUND)).encode("utf-8", "surrogateescape"))
    with pytest.raises(GaugeError, match=complaint) as failure:
        overheads_for("L4", tmp_path)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "same"), [("1x24GB", "24GB"), ("1 × 24GB", "24GB"), ("1X RTX 4090", "GeForce RTX 4090")]
)
def test_one_gpu_can_be_counted(text: str, same: str) -> None:
    assert gpus.lookup(text).usable_bytes == gpus.lookup(same).usable_bytes
