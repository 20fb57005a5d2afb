"""Locations of the project's data files and the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

PROJECT = Path(__file__).resolve().parents[1]
COMMIT = PROJECT / ".bundled-commit.json"
"""The commit of a checkout that `peft-gauge bundle` copied to a node, where there is no git history."""


def fixture(name: str) -> Path:
    """The data file or folder ``name`` of ``fixtures/``: in the checkout, or the copy inside an installed wheel."""
    in_checkout = PROJECT / "fixtures" / name
    return in_checkout if in_checkout.exists() else Path(__file__).resolve().parent / "_data" / name


def calibrations() -> Path:
    """The user's folder of calibrations, one file per GPU (`peft-gauge calibrate`); ``PEFT_GAUGE_CALIBRATIONS``
    overrides it."""
    override = os.environ.get("PEFT_GAUGE_CALIBRATIONS")
    return Path(override) if override else platformdirs.user_data_path("peft-gauge") / "calibrations"


def cache() -> Path:
    """The user's cache folder for downloaded weights; ``PEFT_GAUGE_CACHE`` overrides it."""
    override = os.environ.get("PEFT_GAUGE_CACHE")
    return Path(override) if override else platformdirs.user_cache_path("peft-gauge")
