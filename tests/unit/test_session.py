"""The session of pytest that runs these tests."""

from __future__ import annotations

import pytest


def test_logging_is_not_captured_unless_an_option_asks_for_it(pytestconfig: pytest.Config) -> None:
    options = ("log_level", "log_cli_level", "log_file", "log_file_level")
    if any(pytestconfig.getoption(name, None) for name in options):
        pytest.skip("an option of this session asks for it")
    assert pytestconfig.pluginmanager.get_plugin("logging-plugin") is None
