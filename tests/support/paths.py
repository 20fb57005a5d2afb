"""Where the checkout and the data of the tests are; test files move between folders, these stay."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
DATA = TESTS / "data"
REFERENCE = TESTS / "reference"
RESULTS = ROOT / "results"
