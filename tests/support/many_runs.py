"""A history of many machines, made from one saved run of this repository: real files in the project's own schema.

``python -m tests.support.many_runs FOLDER --machines 20 --nights 365`` writes 7,300 runs of 60 cases (438,000 rows, 3.0
GB). Each night repeats the measured cases of run 0010 (seven methods: fingerprint, peak, four times, parameters, plan)
with noise of machine, night and round in its times, and every 90 nights an upgrade that changes an operator and a peak.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

from peft_gauge.history.reader import read_run
from peft_gauge.history.schema import CONTROL_SAMPLES, SAMPLES, CaseRecord, as_json
from peft_gauge.history.writer import write_run
from tests.support.paths import RESULTS

START = datetime(2025, 11, 1, 3, tzinfo=UTC)
CASES = 60
UPGRADE_EVERY = 90
MODULES = ("test_fingerprint", "test_memory", "test_speed", "test_trainable_params", "test_memory_plan")


@cache
def template() -> Any:
    """The run that every night repeats, cut to `CASES` cases: those of a method first."""
    (path,) = (RESULTS / "amd-epyc-2c-cpu").glob("0010_*.json")
    run = read_run(path)
    found = [case for case in run.cases if case.benchmark in MODULES]
    found.sort(key=lambda case: "smollm2-135m-cpu" not in case.id)
    return replace(run, cases=tuple(found[:CASES]))


def machine_name(machine: int) -> str:
    return f"node-{machine:02}"


def write_machine(folder: Path, nights: int, machine: int, *, first: int = 0, cases: int = CASES) -> list[Path]:
    """The runs of ``machine`` in nights ``first`` to ``nights``."""
    return [write_night(folder, machine, night, cases) for night in range(first, nights)]


def write_night(folder: Path, machine: int, night: int, cases: int = CASES) -> Path:
    """One run. The same numbers give the same file."""
    run, generator = template(), random.Random(f"{machine} {night}")
    speed = random.Random(machine).uniform(0.6, 1.6) * generator.lognormvariate(0, 0.03)
    release = night // UPGRADE_EVERY
    records = [_case(case, speed, release, generator) for case in run.cases[:cases]]
    metrics = {record.id: record.metrics for record in records}
    when = START + timedelta(days=night)
    name = machine_name(machine)
    libraries = {**run.libraries, "torch": f"2.{10 + release}.0"}
    document = {
        "machine_info": {**run.machine, "name": name, "libraries": libraries},
        "commit_info": {**run.commit, "id": f"{night:040x}"},
        "benchmarks": [
            {
                **entry,
                "extra_info": metrics[entry["fullname"]],
                "stats": _stats(entry["stats"], metrics[entry["fullname"]]),
            }
            for entry in run.benchmarks
            if entry["fullname"] in metrics
        ],
        "datetime": when.isoformat(),
        "version": "5.3.1",
        "peft_gauge": as_json(records, [dict(claim) for claim in run.claims], dict(run.options)),
    }
    return write_run(folder, name, document, now=when)


def _case(case: CaseRecord, speed: float, release: int, generator: random.Random) -> CaseRecord:
    metrics = dict(case.metrics)
    if SAMPLES in metrics:
        metrics |= _times(metrics, speed, generator)
    if "rss_peak_bytes" in metrics:
        metrics["rss_peak_bytes"] = int(metrics["rss_peak_bytes"] * generator.lognormvariate(0, 0.002)) // 4096 * 4096
        metrics["tensor_peak_bytes"] += 4096 * release
    if "process_seconds" in metrics:
        metrics["process_seconds"] *= speed
    if "fingerprint" in metrics and release:
        metrics["fingerprint"] = copy.deepcopy(metrics["fingerprint"])
        operators = metrics["fingerprint"]["operators"]["forward"]
        name = next(iter(operators))
        operators[name] = {module: count + release for module, count in operators[name].items()}
    return replace(case, metrics=metrics)


def _times(metrics: dict[str, Any], speed: float, generator: random.Random) -> Iterator[tuple[str, Any]]:
    """New samples of a case and its control, and the metrics that follow from them."""

    def drawn(samples: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
        return {
            name: [[one * speed * generator.lognormvariate(0, 0.02) for one in rounds] for rounds in processes]
            for name, processes in samples.items()
        }

    seconds, control = drawn(metrics[SAMPLES]), drawn(metrics[CONTROL_SAMPLES])
    yield from ((SAMPLES, seconds), (CONTROL_SAMPLES, control))
    for name, (rounds,) in seconds.items():
        (beside,) = control[name]
        yield name, statistics.median(rounds)
        yield "control_seconds", statistics.median(beside)
        over_control = statistics.median(a / b for a, b in zip(rounds, beside, strict=True))
        yield name.replace("_seconds", "_over_control"), over_control
    for name in ("tokens_per_second", "flops_per_second", "weights_read_per_second_bytes"):
        if name in metrics:
            yield name, metrics[name] / speed


def _stats(stats: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    ((rounds,),) = metrics[SAMPLES].values()
    return {**stats, "median": statistics.median(rounds), "data": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machines", type=int, default=20)
    parser.add_argument("--nights", type=int, default=365)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        work = partial(write_machine, options.folder, options.nights)
        files = [file for found in pool.map(work, range(options.machines)) for file in found]
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} runs, {len(files) * CASES} cases, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
