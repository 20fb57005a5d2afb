"""Which operators does a training step run, where, with how many FLOPs and bytes, and what are its first losses?

Nothing is timed here. The record is the same in every run of the same library versions, so a difference between two
versions is real on any machine (`peft-gauge compare` shows it line by line).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.measured import Measured


pytestmark = [pytest.mark.measures("fingerprint"), pytest.mark.quick]


def test_fingerprint(measured: Measured, record: Callable[..., None]) -> None:
    found = measured.metrics["fingerprint"]

    record(fingerprint=found)
    assert found["trainable"]["total"] == measured.metrics["counted"]["trainable_params"]
    assert found["adapter_bytes"] == measured.metrics["counted"]["adapter_disk_bytes"]
