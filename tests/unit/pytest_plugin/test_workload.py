"""What a session needs planned and measured, as the markers of its tests declare it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peft_gauge.errors import GaugeError
from peft_gauge.plan.record import PlanRequest
from peft_gauge.pytest_plugin.workload import Job, Workload, check_markers
from peft_gauge.training import methods, models
from peft_gauge.training.cases import Case
from peft_gauge.training.settings import StepSettings

TOY = models.resolve("toy-llama", weights="random")
CONFIG = SimpleNamespace(getoption={"--seq": 16}.__getitem__)


def case(method: str) -> Case:
    return Case(TOY, methods.get(method), StepSettings(2, 16), "cpu", "float32")


def item(*marks: pytest.MarkDecorator, name: str = "test_x", fixtures: tuple[str, ...] = (), **parameters: Any) -> Any:
    """A collected test with these marks and parameters, as far as a workload reads it."""

    def of(kind: str) -> list[pytest.Mark]:
        return [each.mark for each in marks if each.name == kind]

    return SimpleNamespace(
        nodeid=f"benchmarks/test_x.py::{name}",
        fixturenames=fixtures,
        callspec=SimpleNamespace(params=parameters),
        config=CONFIG,
        iter_markers=of,
        get_closest_marker=lambda kind: next(iter(of(kind)), None),
    )


def measuring(method: str, *passes: str, shapes: bool = False, **more: Any) -> Any:
    return item(pytest.mark.measures(*passes, shapes=shapes), fixtures=("measured",), case=case(method), **more)


def step(model: str, method: methods.Method, seq: int = 8) -> list[PlanRequest]:
    return [PlanRequest(models.resolve(model, weights="random"), method, StepSettings(1, seq))]


def test_tests_of_one_case_share_a_process_that_takes_the_passes_of_all() -> None:
    peak, step_time = measuring("lora", "memory"), measuring("lora", "speed", name="test_step")
    growth, plain = measuring("ia3", "memory", shapes=True), item(model="toy-llama")
    found = Workload.of([peak, growth, step_time, plain])

    lora, ia3 = Job(case("lora")), Job(case("ia3"))
    assert {job: (asked.passes, asked.shapes) for job, asked in found.processes.items()} == {
        lora: (("memory", "speed"), ()),
        ia3: (("memory",), ((1, 16), (2, 8), (1, 8))),
    }
    assert (found.tests, found.others) == ({lora: [peak, step_time], ia3: [growth]}, [plain])


def test_with_a_budget_further_shapes_are_a_process_of_their_own_whose_plans_wait() -> None:
    found = Workload.of([measuring("lora", "memory"), measuring("lora", "memory", shapes=True)], split=True)
    whole, shapes = found.processes.values()
    assert (whole.job.shapes, whole.shapes, shapes.job.shapes, len(shapes.shapes)) == (False, (), True, 3)
    assert found.steps == tuple(whole.steps)
    together = Workload.of([measuring("lora", "memory"), measuring("lora", "memory", shapes=True)])
    assert len(together.steps) == 4


def test_the_marker_names_steps_by_parameters_of_the_test() -> None:
    by_method = pytest.mark.plans(steps=step)
    by_option = pytest.mark.plans(steps=lambda config, model: step(model, methods.LORA, seq=config.getoption("--seq")))
    tests = [
        item(by_method, model="toy-llama", method=methods.IA3, seq=4, other="unused"),
        item(by_method, model="toy-llama", method=methods.IA3, seq=4),
        item(by_option, model="toy-llama"),
    ]
    assert Workload.of(tests).steps == (
        *step("toy-llama", methods.IA3, 4),
        *step("toy-llama", methods.LORA, 16),
    )


def test_nothing_is_named_before_a_plan_is_needed_and_then_once() -> None:
    calls: list[str] = []

    def steps(model: str) -> list[PlanRequest]:
        calls.append(model)
        return step(model, methods.LORA)

    found = Workload.of([item(pytest.mark.plans(steps=steps), model="toy-llama")])
    assert calls == []
    assert found.steps == found.steps == tuple(step("toy-llama", methods.LORA))
    assert calls == ["toy-llama"]


def test_a_test_that_cannot_name_its_steps_reports_that_itself() -> None:
    def refuse() -> list[PlanRequest]:
        raise GaugeError("no weights")

    def named() -> list[PlanRequest]:
        return step("toy-llama", methods.LORA)

    both = [item(pytest.mark.plans(steps=refuse)), item(pytest.mark.plans(steps=named))]
    assert Workload.of(both).steps == tuple(named())


def test_skipped_tests_need_nothing_but_keep_their_place() -> None:
    skipped = item(
        pytest.mark.measures("memory"), pytest.mark.skip(reason="x"), fixtures=("measured",), case=case("lora")
    )
    named = item(pytest.mark.plans(steps=lambda: step("toy-llama", methods.LORA)), pytest.mark.skip(reason="x"))
    found = Workload.of([skipped, named])
    assert (dict(found.processes), found.steps) == ({}, ())
    assert (found.tests, found.others) == ({Job(case("lora")): [skipped]}, [named])


def test_claims_that_a_test_decides() -> None:
    deciding = item(pytest.mark.claim("rank-tradeoff"))
    assert Workload.of([deciding, item()]).claims == {"rank-tradeoff"}


def test_a_parameter_called_measured_is_no_process() -> None:
    own = item(pytest.mark.measures("memory"), fixtures=("measured",), measured=1, case=case("lora"))
    assert Workload.of([own]).processes == {}


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (pytest.mark.plans(3), "takes steps=FUNCTION"),
        (pytest.mark.plans(steps=3), "takes steps=FUNCTION"),
        (pytest.mark.plans(steps=step, more=1), "takes steps=FUNCTION"),
        (
            pytest.mark.plans(steps=lambda modle: []),
            "has a parameter 'modle', which is neither a parameter of the test",
        ),
    ],
)
def test_a_wrong_marker_is_a_usage_error(mark: pytest.MarkDecorator, message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        check_markers(item(mark, model="toy-llama"))
    check_markers(item(pytest.mark.plans(steps=step), model="toy-llama", method=methods.LORA, seq=1))
