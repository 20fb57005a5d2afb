"""Python's garbage collector, turned off for a block or for a program's end."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from peft_gauge.collector import no_collector

CYCLE = """
import gc
from peft_gauge.collector import end_quickly
gc.disable()

class Node:
    def __del__(self):
        print("collected")

node = Node()
node.itself = node
del node
"""


@pytest.mark.parametrize(("then", "printed"), [("", "collected\n"), ("end_quickly()", "")])
def test_a_program_can_end_without_collecting(then: str, printed: str) -> None:
    ended = subprocess.run([sys.executable, "-c", CYCLE + then], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, printed, "")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_off_in_the_block_and_then_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with no_collector():
            inside = gc.isenabled()
        after = gc.isenabled()
    finally:
        (gc.enable if before else gc.disable)()
    assert (inside, after) == (False, enabled)
