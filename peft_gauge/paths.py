"""Locations of the project's data files and the user's folders."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent
PROJECT = PACKAGE.parent
COMMIT = PROJECT / ".bundled-commit.json"
"""The commit of a checkout that `peft-gauge bundle` copied to a node, where there is no git history."""


def is_installed() -> bool:
    """Whether this package came in a wheel, which has the suite inside it and no checkout around it."""
    return (PACKAGE / "_suite").is_dir()


def suite() -> Path:
    """The folder that pytest runs the suite in: ``pytest.ini``, ``conftest.py``, ``benchmarks/`` and ``fixtures/`` of
    the checkout, or their copy inside an installed wheel."""
    return PACKAGE / "_suite" if is_installed() else PROJECT


def fixture(name: str) -> Path:
    """The data file or folder ``name`` of the suite's ``fixtures/``."""
    return suite() / "fixtures" / name


def calibrations() -> Path:
    """The user's folder of calibrations, one file per GPU (`peft-gauge calibrate`); ``PEFT_GAUGE_CALIBRATIONS``
    overrides it."""
    override = os.environ.get("PEFT_GAUGE_CALIBRATIONS")
    return Path(override) if override else platformdirs.user_data_path("peft-gauge") / "calibrations"


def cache() -> Path:
    """The user's cache folder for downloaded weights and for runs of an address; ``PEFT_GAUGE_CACHE`` overrides it."""
    override = os.environ.get("PEFT_GAUGE_CACHE")
    return Path(override) if override else platformdirs.user_cache_path("peft-gauge")
