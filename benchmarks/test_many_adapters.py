"""Can one base serve many adapters?

N adapters share one base, through PEFT's own interface: what does a further one cost, in memory and on disk, compared
with a further copy of the model? How long does a switch take, compared with a forward? Is an adapter's output after
switching away and back the same to the last bit? Does each row of a batch that mixes adapters equal its adapter's
output alone? What do merging and unmerging leave behind? And which ways to serve rows with alternating adapters
(switching, a mixed batch, merging, reading each from disk, a full copy for each) are worth their memory?

Each adapter has its own seed for all weights, B included (trained adapters have no zeros there). All counts of a case
are measured in one separate process. The weights of a GGUF model are random unless ``--weights real`` is given:
neither bytes nor times depend on them, and reading them takes longer than the rest. Rows are short (``--seq`` changes
that).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from peft_gauge import isolation
from peft_gauge.clock.rounds import StoppingRule, WarmUp
from peft_gauge.errors import GaugeError
from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES
from peft_gauge.measure import PRELOAD
from peft_gauge.pytest_plugin.selection import selected_cases
from peft_gauge.pytest_plugin.workers import process_environment
from peft_gauge.serving.observed import TOLERANCE
from peft_gauge.serving.passes import ServingSetup
from peft_gauge.serving.server import check_served
from peft_gauge.training import methods, models
from peft_gauge.training.cases import Case, count_on_meta

if TYPE_CHECKING:
    from peft_gauge.isolation import ProcessOutcome

    Record = Callable[..., None]

pytestmark = pytest.mark.slow  # a bare run has no time left in its five minutes

COUNTS = [4, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 16, 64))]

SEQ = 4
"""Sequence length in tokens."""

WARM_UP = WarmUp(least=1, most=1, window=1)
RULE = StoppingRule(min_rounds=5, max_rounds=5)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """LoRA and QLoRA, or the methods given by options; on each device that the run selects."""
    config = metafunc.config
    chosen = config.getoption("--method") or config.getoption("--adapter")
    found = selected_cases(config)
    if not chosen:
        found = [case for case in found if case.method in (methods.LORA, methods.QLORA)]
    shaped = [short(case, config) for case in found]
    metafunc.parametrize(
        "asked", [pytest.param(case, id=case.id, marks=marks(case, chosen=bool(chosen))) for case in shaped]
    )


def marks(case: Case, *, chosen: bool) -> list[pytest.MarkDecorator]:
    found = [pytest.mark.gpu] if case.device == "cuda" else []
    if case.method.quantization is not None and not chosen:
        found.append(pytest.mark.slow)
    try:
        check_served(case.method)
    except GaugeError as error:
        found.append(pytest.mark.skip(reason=str(error)))
    return found


def short(case: Case, config: pytest.Config) -> Case:
    """``case`` with a short sequence, and random weights in place of a GGUF's."""
    model = case.model
    if config.getoption("--weights") is None and str(model.location).endswith(".gguf"):
        model = replace(model, weights="random", location=None)
    seq = case.settings.seq if config.getoption("--seq") is not None else min(SEQ, case.settings.seq)
    return replace(case, model=model, settings=replace(case.settings, batch=1, seq=seq))


@pytest.fixture(scope="module")
def measurements(request: pytest.FixtureRequest) -> Callable[[Case], ProcessOutcome]:
    """``measurements(case)``: all counts of the case in this session, measured in one process."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]

    @cache
    def measure(case: Case) -> ProcessOutcome:
        params: list[dict[str, Any]] = [dict(item.callspec.params) for item in items]
        counts = {each["number"] for each in params if each["asked"] == case and "number" in each}
        return isolation.run(
            "peft_gauge.serving.passes:measure",
            ServingSetup(case, tuple(sorted(counts)) or (1,), RULE, WARM_UP),
            limit_seconds=request.config.getoption("--time-limit"),
            environment=process_environment(),
            preload=PRELOAD,
        )

    return measure


@dataclass(frozen=True)
class Served:
    """A measured case: the records of `peft_gauge.serving.passes.measure`."""

    case: Case
    by_number: dict[int, dict[str, Any]]
    reloading: dict[str, Any]
    turnover: dict[str, Any]
    merging: dict[str, Any]


@pytest.fixture
def served(asked: Case, measurements: Callable[[Case], ProcessOutcome], record: Record) -> Served:
    """The measured case of this test. A case that failed ends the test, with its last known readings."""
    outcome = measurements(asked)
    settings = {"dtype": asked.dtype, "weights": asked.model.weights, "seed": asked.seed, "seq": asked.settings.seq}
    record(architecture=asked.model.name, trained_by=asked.method.name, settings=settings, **outcome.origin)
    if outcome.ended != "done":
        ended = "failed" if outcome.ended == "refused" else outcome.ended
        record(ended=ended, last_known=dict(outcome.last))
        pytest.fail(str(outcome.reason) if ended == "failed" else f"{ended}: {outcome.reason}", pytrace=False)
    value = outcome.value
    by_number = {each["adapters"]: each for each in value["served"]}
    return Served(asked, by_number, value["reloading"], value["turnover"], value["merging"])


@pytest.mark.parametrize("number", COUNTS)
def test_bytes_of_a_further_adapter(number: int, served: Served, record: Record) -> None:
    found = served.by_number[number]

    names = ("adapter_bytes", "full_copy_bytes", "served_bytes", "full_copies_bytes")
    record(adapters=number, **{name: found[name] for name in names})
    assert found["adapter_bytes"] == expected_bytes(served.case)
    assert found["served_bytes"] == found["full_copy_bytes"] + number * expected_bytes(served.case)


def expected_bytes(case: Case) -> int:
    """Bytes of one adapter's tensors. By default PEFT keeps 16-bit adapters in float32."""
    itemsize = 4 if case.method.autocast_adapter_dtype else models.torch_dtype(case.dtype).itemsize
    return count_on_meta(case.model, case.method).trainable_params * itemsize


def test_to_disk_and_back(served: Served, record: Record) -> None:
    found = served.turnover

    forward_seconds = statistics.median(served.by_number[max(served.by_number)]["control_seconds"])
    record(adapter_disk_bytes=found["disk_bytes"], load_over_forward=found["load_seconds"] / forward_seconds)
    tensors_bytes = expected_bytes(served.case)
    # A file consists of the tensors and a header that names them.
    assert tensors_bytes < found["disk_bytes"] < 1.1 * tensors_bytes + 65_536
    assert found["same"], "the adapter's output changed after saving and loading"
    assert found["kept_bytes"] == 0, "loading and deleting an adapter left memory in use"


@pytest.mark.parametrize("number", COUNTS)
def test_switching_away_and_back(number: int, served: Served, record: Record) -> None:
    found = served.by_number[number]

    record(
        adapters=number,
        switch_seconds=statistics.median(found["switch_seconds"]),
        switch_over_forward=found["switch_over_forward"],
        least_difference=found["least_difference"],
        **{
            SAMPLES: {"switch_seconds": [found["switch_seconds"]]},
            CONTROL_SAMPLES: {"switch_seconds": [found["control_seconds"]]},
        },
    )
    assert found["returned"] == found["visited"], "an output was not reproduced to the last bit"
    assert found["least_difference"] > 0, "two adapters with different weights gave the same output"


@pytest.mark.parametrize("number", COUNTS)
def test_a_batch_that_mixes_adapters(number: int, served: Served, record: Record) -> None:
    """The tolerance is measured: the difference between the same rows of one adapter in a batch and alone."""
    found = served.by_number[number]

    names = ("mixed_max_error", "rounding_error", "least_difference")
    record(adapters=number, tolerance=TOLERANCE * found["rounding_error"], **{name: found[name] for name in names})
    assert found["mixed_holds"], "a row of the mixed batch differs from its adapter's output alone"


@pytest.mark.parametrize("number", COUNTS)
def test_ways_to_serve(number: int, served: Served, record: Record) -> None:
    """Merging is left out for a quantized base: it would quantize the base again with every row."""
    found = served.by_number[number]

    ways = [*found["ways"], served.reloading]
    points = [
        {"label": way["way"], "held_bytes": way["held_bytes"], "quality": way["rows_per_forward"]} for way in ways
    ]
    # The control itself: a copy with its adapter merged in takes as long as the base.
    points.append({"label": "full copies", "held_bytes": found["full_copies_bytes"], "quality": 1.0})
    times = {f"{way['way'].replace(' ', '_')}_seconds": way for way in ways}
    record(
        adapters=number,
        quality_is="rows per forward of the base",
        pareto=points,
        **{metric: statistics.median(way["seconds"]) for metric, way in times.items()},
        **{
            SAMPLES: {metric: [way["seconds"]] for metric, way in times.items()},
            CONTROL_SAMPLES: {metric: [way["control_seconds"]] for metric, way in times.items()},
        },
    )
    assert {way["held_bytes"] for way in found["ways"]} == {found["served_bytes"]}
    two_bytes = 2 * expected_bytes(served.case)
    assert served.reloading["held_bytes"] == found["full_copy_bytes"] + two_bytes, "adapters stay in memory"


def test_merging_and_unmerging(served: Served, record: Record) -> None:
    """Merging and unmerging quantize a quantized base again; the loss is recorded, and no rounding bound applies."""
    found = served.merging

    record(**found)
    if served.case.method.quantization is None:
        assert found["merged_share_of_bound"] <= 1, "a merged layer differs from the unmerged one beyond rounding"
        assert found["restored_share_of_bound"] <= 1, "unmerging leaves more than rounding explains"
