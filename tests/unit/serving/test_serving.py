"""One base with many adapters against known truths: bytes by formula, and planted faults that must be seen."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_gauge.clock.rounds import StoppingRule, Stopwatch, WarmUp
from peft_gauge.errors import GaugeError
from peft_gauge.serving import observed, passes, ways
from peft_gauge.serving.observed import Mixing
from peft_gauge.serving.server import BASE, FIRST, Server, grow, stored_bytes, token_ids
from peft_gauge.training import methods, models
from peft_gauge.training.cases import Case
from peft_gauge.training.settings import StepSettings

# Builds, plans or trains models: seconds, which are too long for the unit tests.
pytestmark = pytest.mark.integration

TOY = models.resolve("toy-llama", weights="random")
ONCE = StoppingRule(min_rounds=3, max_rounds=3), WarmUp(least=1, most=1, window=1)


def toy_server(number: int = 1, cls: type[Server] = Server, method: str = "lora", **changes: object) -> Server:
    """``number`` adapters on toy-llama (or one that differs from it in ``changes``)."""
    toy = models.ModelRecord("toy", "record", json.dumps({**TOY.config, **changes}), "random")
    server = cls(models.build(toy), methods.get(method))
    grow(server, number)
    return server


def ids_for(server: Server, rows: int = 1) -> Tensor:
    return token_ids(server, rows, seq=6, seed=0)


def mixing(server: Server) -> Mixing:
    names = [*server.names, BASE, FIRST]
    ids = ids_for(server, len(names))
    return observed.mix(server, ids, names, observed.visit(server, ids, server.names))


# Bytes.


def formula_bytes(rank: int) -> int:
    """4 bytes × r(d + k) for each adapted matrix, d outputs and k inputs (Hu et al. 2021, section 4.2)."""
    width, key_width, blocks = 64, 32, 2
    q, k, v, o = (width, width), (key_width, width), (key_width, width), (width, width)
    return 4 * blocks * sum(rank * (outputs + inputs) for outputs, inputs in (q, k, v, o))


@pytest.mark.parametrize(("method", "rank"), [("lora", 16), ("lora-r4", 4)])
def test_an_adapter_takes_the_bytes_of_its_formula(method: str, rank: int) -> None:
    server = toy_server(method=method)
    assert server.adapters_bytes == formula_bytes(rank)
    assert server.base_bytes == stored_bytes(models.build(TOY))


@pytest.mark.parametrize(("method", "itemsize"), [("lora", 4), ("lora-16bit", 2)])
def test_an_added_adapter_has_the_dtype_of_the_first(method: str, itemsize: int) -> None:
    server = Server(models.build(TOY, dtype="bfloat16"), methods.get(method))
    grow(server, 3)
    assert server.adapters_bytes == 3 * formula_bytes(16) * itemsize / 4
    assert mixing(server).holds


@pytest.mark.slow
def test_64_adapters_take_64_times_as_much() -> None:
    assert toy_server(64).adapters_bytes == 64 * formula_bytes(16)


def test_a_file_holds_the_very_tensors(tmp_path: Path) -> None:
    server = toy_server(2)
    file = server.save("task-1", tmp_path) / "adapter_model.safetensors"
    assert sum(tensor.nbytes for tensor in load_file(file).values()) == formula_bytes(16)
    found = observed.turn_over(server, ids_for(server), "task-1")
    assert found.disk_bytes == file.stat().st_size
    assert (found.same, found.kept_bytes, server.names) == (True, 0, [FIRST, "task-1"])


def test_what_a_deleted_adapter_leaves_behind_is_seen() -> None:
    class Hoarding(Server):
        def delete(self, name: str) -> None:
            super().delete(name)
            self.model.register_buffer("kept", torch.zeros(5))

    server = toy_server(2, Hoarding)
    assert observed.turn_over(server, ids_for(server), FIRST).kept_bytes == 20


def test_an_adapter_that_loads_as_another_one_is_seen() -> None:
    class Confusing(Server):
        def load(self, folder: Path, name: str) -> None:
            super().load(folder, name)
            self._draw(name, seed=99)

    server = toy_server(1, Confusing)
    assert not observed.turn_over(server, ids_for(server), FIRST).same


# Switching.


def test_outputs_come_back_and_differ() -> None:
    server = toy_server(4)
    found = observed.visit(server, ids_for(server), server.names)
    assert found.returned == (BASE, *server.names)
    assert found.least_difference > 0.01


def test_an_output_is_that_of_the_adapter_alone() -> None:
    """The last of four, against a base with that adapter and no other."""
    server, ids = toy_server(4), ids_for(toy_server())
    alone = Server(models.build(TOY), methods.LORA, seed=3)
    server.switch("task-3")
    assert torch.equal(server.logits(ids), alone.logits(ids))
    assert torch.equal(server.base_logits(ids), models.build(TOY)(input_ids=ids, use_cache=False).logits)


def test_a_switch_that_does_not_restore_is_seen() -> None:
    class Leaking(Server):
        def switch(self, name: str) -> None:
            super().switch(name)
            if name == "task-1":  # what it leaves in the base, others meet
                with torch.no_grad():
                    self.model.get_input_embeddings().weight.mul_(1 + 2.0**-22)

    server = toy_server(3, Leaking)
    found = observed.visit(server, ids_for(server), server.names)
    assert found.returned == ()


def test_a_switch_that_does_nothing_is_seen() -> None:
    class Idle(Server):
        def switch(self, name: str) -> None:
            pass

    server = toy_server(3, Idle)
    assert observed.visit(server, ids_for(server), server.names).least_difference == 0


def test_every_adapter_is_switched_to_in_turn() -> None:
    seen: list[str] = []

    class Listening(Server):
        def switch(self, name: str) -> None:
            seen.append(name)
            super().switch(name)

    server = toy_server(2, Listening)
    rounds = observed.time_switches(server, ids_for(server), *ONCE)
    assert seen == [FIRST, "task-1"] * 2  # one to warm up, three that count
    assert len(rounds.seconds) == len(rounds.control_seconds) == 3
    assert all(seconds > 0 for seconds in (*rounds.seconds, *rounds.control_seconds))


# Mixed batches.


def test_a_mixed_batch_is_row_by_row_what_each_adapter_gives() -> None:
    found = mixing(toy_server(3))
    assert found.holds, found
    assert found.max_error < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda names: [*names[1:], names[0]],
        lambda names: [FIRST] * len(names),
        lambda names: [BASE] * len(names),
        lambda names: [FIRST if name == BASE else name for name in names],
    ],
    ids=["rotated", "all through the first", "all through the base", "no row through the base"],
)
def test_a_wrong_mixing_is_seen(wrong: Callable[[Sequence[str]], list[str]]) -> None:
    class Wrong(Server):
        def mixed_logits(self, ids: Tensor, names: Sequence[str]) -> Tensor:
            return super().mixed_logits(ids, wrong(names))

    assert not mixing(toy_server(3, Wrong)).holds


def test_dropout_that_was_left_on_is_seen() -> None:
    """It makes outputs random, and so the measured rounding error, too; then nothing is within rounding."""
    server = toy_server(3)
    for layer in server.layers().values():
        layer.lora_dropout.train()
    found = mixing(server)
    assert found.rounding_error > 0.001
    assert not found.holds
    assert observed.visit(server, ids_for(server), server.names).returned == (BASE,)


@pytest.mark.parametrize(("error", "holds"), [(1e-6, True), (1.1e-6, False), (math.nan, False)])
def test_the_tolerance_is_ten_times_the_rounding(error: float, holds: bool) -> None:
    assert Mixing(error, rounding_error=1.01e-7, least_difference=1.0).holds is holds
    assert not Mixing(error, rounding_error=1.01e-7, least_difference=1e-6).holds


# Merging.


def test_merging_and_unmerging_stay_within_rounding() -> None:
    server = toy_server(2)
    server.switch("task-1")
    found = observed.merge_cycles(server, ids_for(server), cycles=3)
    assert 0 < found.max_error < 1e-5
    assert len(found.outputs) == 2 * len(found.restored) == 2 * observed.CHECKED_LAYERS
    assert all(check.holds for check in (*found.outputs, *found.restored))
    assert len(found.drifts) == 3
    assert 0 < found.drifts[0] <= found.weight_size * 2.0**-22


def test_what_unmerging_leaves_behind_is_seen() -> None:
    class Leaving(Server):
        def unmerge(self) -> None:
            super().unmerge()
            with torch.no_grad():
                for layer in self.layers().values():
                    layer.get_base_layer().weight.add_(1e-4)

    server = toy_server(1, Leaving)
    found = observed.merge_cycles(server, ids_for(server), cycles=3)
    assert not any(check.holds for check in found.restored)
    assert found.drifts == pytest.approx([1e-4, 2e-4, 3e-4], rel=1e-3)


def test_a_merge_of_half_an_adapter_is_seen() -> None:
    class Halving(Server):
        def merge(self) -> None:
            super().merge()
            with torch.no_grad():
                for layer in self.layers().values():
                    layer.get_base_layer().weight.sub_(layer.get_delta_weight(FIRST) / 2)

    server = toy_server(1, Halving)
    found = observed.merge_cycles(server, ids_for(server), cycles=1)
    assert not any(check.holds for check in found.outputs)
    assert found.max_error > 0.01


def test_a_4bit_base_loses_far_more_by_merging() -> None:
    pytest.importorskip("bitsandbytes", reason="a 4-bit base needs bitsandbytes")
    server = toy_server(2, method="qlora")
    assert server.adapters_bytes == 2 * formula_bytes(16)
    assert mixing(server).holds
    server.switch(FIRST)
    assert server.adapters_bytes == 2 * formula_bytes(16), "its use changed how the base is stored"
    found = observed.merge_cycles(server, ids_for(server), cycles=2)
    assert (found.outputs, found.restored) == ((), ())
    assert found.drifts[0] > found.weight_size * 2.0**-10
    assert found.max_error > 1e-3


# Ways of serving.


class Clocked(Server):
    """What each operation takes, in seconds, is known; switching all adapters off or on takes the most."""

    now = 0.0

    def __getattribute__(self, name: str) -> object:
        seconds = {
            "logits": 1.0,
            "switch": 0.25,
            "mixed_logits": 2.0,
            "merge": 0.5,
            "unmerge": 0.75,
            "load": 3.0,
            "delete": 0.125,
            "turn_off": 100.0,
            "turn_on": 100.0,
        }.get(name)
        found = super().__getattribute__(name)
        if seconds is None:
            return found

        def work(*arguments: object) -> object:
            self.now += seconds
            return found(*arguments)

        return work


def test_a_way_is_timed_for_what_it_does_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    server = toy_server(1, Clocked)
    assert isinstance(server, Clocked)
    monkeypatch.setattr(ways, "Stopwatch", lambda device: Stopwatch(device, clock=lambda: server.now))
    reloading = ways.reloading(server, ids_for(server), *ONCE)
    grow(server, 4)

    found = {way.name: way for way in [reloading, *ways.beside(server, ids_for(server, 4), *ONCE)]}

    assert {name: way.seconds for name, way in found.items()} == {
        "reloading": (4.625,) * 3,  # load, switch, a row, switch back, delete
        "switching": (1.25,) * 3,
        "mixed batch": (2.0,) * 3,
        "merging": (2.5,) * 3,
    }
    assert {way.control_seconds for way in found.values()} == {(1.0,) * 3}
    assert {name: way.rows_per_forward for name, way in found.items()} == {
        "reloading": 1 / 4.625,
        "switching": 0.8,
        "mixed batch": 2.0,
        "merging": 0.4,
    }
    base_bytes = stored_bytes(models.build(TOY))
    assert {name: way.held_bytes - base_bytes for name, way in found.items()} == {
        "reloading": 2 * formula_bytes(16),
        "switching": 4 * formula_bytes(16),
        "mixed batch": 4 * formula_bytes(16),
        "merging": 4 * formula_bytes(16),
    }


def test_the_control_is_the_base_and_each_way_gives_its_adapters_output(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Tensor] = []

    class Listening(Server):
        def logits(self, ids: Tensor) -> Tensor:
            found = super().logits(ids)
            rows.append(found)
            return found

    server = toy_server(2, Listening)
    ids = ids_for(server, 2)
    expected = [observed.visit(server, ids[:1], server.names).outputs[name] for name in (BASE, FIRST, "task-1")]
    monkeypatch.setattr(Server, "mixed_logits", lambda self, ids, names: None)
    rows.clear()

    ways.beside(server, ids, StoppingRule(min_rounds=2, max_rounds=2), WarmUp(least=2, most=2, window=1))

    switching, mixed, merging = rows[:8], rows[8:12], rows[12:]
    assert [torch.equal(row, expected[place]) for row, place in zip(switching, [0, 1, 0, 2] * 2, strict=True)] == [
        True
    ] * 8
    assert all(torch.equal(row, expected[0]) for row in mixed)
    for row, place in zip(merging, [0, 1, 0, 2] * 2, strict=True):
        torch.testing.assert_close(row, expected[place])


def test_all_adapters_off_is_the_base_and_on_is_as_before() -> None:
    server = toy_server(2)
    ids = ids_for(server)
    server.switch("task-1")
    before = server.logits(ids)
    server.turn_off()
    assert torch.equal(server.logits(ids), models.build(TOY)(input_ids=ids, use_cache=False).logits)
    server.turn_on()
    assert torch.equal(server.logits(ids), before)


def test_reloading_leaves_the_server_as_it_was() -> None:
    server = toy_server()
    ids = ids_for(server)
    before, bytes_before = server.logits(ids), server.adapters_bytes
    ways.reloading(server, ids, *ONCE)
    assert (server.names, server.adapters_bytes) == ([FIRST], bytes_before)
    assert torch.equal(server.logits(ids), before)
    with pytest.raises(GaugeError, match="got 2 adapters"):
        ways.reloading(toy_server(2), ids, *ONCE)


def test_a_4bit_base_is_not_merged_into() -> None:
    pytest.importorskip("bitsandbytes", reason="a 4-bit base needs bitsandbytes")
    server = toy_server(2, method="qlora")
    assert [way.name for way in ways.beside(server, ids_for(server, 2), *ONCE)] == ["switching", "mixed batch"]


# A whole case.


def test_a_case_measured() -> None:
    case = Case(TOY, methods.LORA, StepSettings(1, 6), "cpu", "float32")
    found = passes.measure(passes.ServingSetup(case, (1, 3), *ONCE, cycles=2))
    assert [record["adapters"] for record in found["served"]] == [1, 3]
    for record in found["served"]:
        assert record["adapter_bytes"] == formula_bytes(16)
        assert record["served_bytes"] == record["full_copy_bytes"] + record["adapters"] * formula_bytes(16)
        assert record["full_copies_bytes"] == record["adapters"] * record["full_copy_bytes"]
        assert record["returned"] == record["visited"] == min(record["adapters"], 2) + 1
        assert record["mixed_holds"]
        assert [way["way"] for way in record["ways"]] == ["switching", "mixed batch", "merging"]
        assert {way["held_bytes"] for way in record["ways"]} == {record["served_bytes"]}
        assert record["ways"][1]["rows"] == record["adapters"]
    assert found["reloading"]["held_bytes"] == found["served"][0]["full_copy_bytes"] + 2 * formula_bytes(16)
    assert found["turnover"]["same"]
    assert found["turnover"]["kept_bytes"] == 0
    assert found["merging"]["merged_share_of_bound"] <= 1
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("names", "most", "found"), [("abcdefg", 3, "adg"), ("abcd", 3, "acd"), ("abc", 3, "abc"), ("a", 3, "a")]
)
def test_names_are_spread(names: str, most: int, found: str) -> None:
    assert observed.spread(list(names), most) == list(found)


# Bad input: one line each, and the server is as it was.


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (lambda server: server.switch("task-9"), "unknown adapter 'task-9'; did you mean task-1"),
        (lambda server: server.delete("task-9"), "unknown adapter 'task-9'"),
        (lambda server: server.save("task-9", Path()), "unknown adapter 'task-9'"),
        (lambda server: server.mixed_logits(ids_for(server, 2), [FIRST, "task-9"]), "unknown adapter 'task-9'"),
        (lambda server: server.mixed_logits(ids_for(server, 2), [FIRST]), "2 rows need 2 adapter names, got 1"),
        (lambda server: server.delete(FIRST), "the adapter 'default' is active; switch to another one"),
        (lambda server: server.add("task-1", seed=0), "there is an adapter 'task-1' already"),
        (lambda server: server.add(BASE, seed=0), "'__base__' is not a valid adapter name"),
        (lambda server: server.add("a.b", seed=0), "'a.b' is not a valid adapter name"),
        (lambda server: server.unmerge(), "no adapter is merged"),
        (lambda server: server.load(Path("nowhere"), "new"), "no adapter in nowhere: adapter_config.json is missing"),
    ],
)
def test_a_mistake_is_one_line(mistake: Callable[[Server], object], said: str) -> None:
    server = toy_server(2)
    with pytest.raises(GaugeError, match=said) as caught:
        mistake(server)
    assert "\n" not in str(caught.value)
    assert server.names == [FIRST, "task-1"]


@pytest.mark.parametrize(
    "work",
    [
        lambda server: server.switch("task-1"),
        lambda server: server.mixed_logits(ids_for(server), [BASE]),
        lambda server: server.base_logits(ids_for(server)),
        lambda server: server.merge(),
        lambda server: server.add("new", seed=0),
    ],
)
def test_a_merged_adapter_is_in_the_way(work: Callable[[Server], object]) -> None:
    server = toy_server(2)
    server.merge()
    with pytest.raises(GaugeError, match="the adapter 'default' is merged into the base; unmerge it first"):
        work(server)


@pytest.mark.parametrize("method", ["full", "bottleneck", "prefix", "ia3"])
def test_a_method_that_cannot_be_mixed_is_refused(method: str) -> None:
    with pytest.raises(GaugeError, match=f"cannot mix adapters of {method} in one batch"):
        toy_server(method=method)


def wider(tmp_path: Path) -> Path:
    return toy_server(hidden_size=128).save(FIRST, tmp_path)


def deeper(tmp_path: Path) -> Path:
    return toy_server(num_hidden_layers=3).save(FIRST, tmp_path)


def shallower(tmp_path: Path) -> Path:
    return toy_server(num_hidden_layers=1).save(FIRST, tmp_path)


def other_modules(tmp_path: Path) -> Path:
    config = json.loads((toy_server().save(FIRST, tmp_path) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
    return tmp_path


def truncated(tmp_path: Path) -> Path:
    file = toy_server().save(FIRST, tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return tmp_path


def incomplete(tmp_path: Path) -> Path:
    file = toy_server().save(FIRST, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path


def of_another_type(tmp_path: Path) -> Path:
    config = json.loads((toy_server().save(FIRST, tmp_path) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    return tmp_path


@pytest.mark.parametrize(
    "foreign",
    [wider, deeper, shallower, other_modules, truncated, incomplete, of_another_type],
    ids=lambda f: f.__name__,
)
def test_a_foreign_adapter_is_refused_and_leaves_nothing(foreign: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = foreign(tmp_path)
    server = toy_server(2)
    ids = ids_for(server)
    before_bytes, before = server.adapters_bytes, server.logits(ids)
    with pytest.raises(GaugeError, match="does not fit this base model") as caught:
        server.load(folder, "foreign")
    assert "\n" not in str(caught.value)
    assert (server.names, server.adapters_bytes) == ([FIRST, "task-1"], before_bytes)
    assert torch.equal(server.logits(ids), before)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = toy_server().save(FIRST, tmp_path / "whole")
    shutil.copy(folder / "adapter_config.json", tmp_path)
    with pytest.raises(GaugeError, match="adapter_model.safetensors is missing"):
        toy_server().load(tmp_path, "half")
