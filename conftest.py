"""Load the suite into pytest: the plugin that runs it (`peft_gauge.pytest_plugin`), and the suite's fixtures."""

from __future__ import annotations

from fixtures import hypothesis_profiles

pytest_plugins = [
    "pytester",
    "peft_gauge.pytest_plugin.hooks",
    "fixtures.facts",
    "fixtures.measured",
    "fixtures.plans",
    "fixtures.replay",
    "fixtures.sweeps",
    "fixtures.verdicts",
    "fixtures.weights",
]

# pytest imports this file before Hypothesis reads --hypothesis-profile, which may name one of these.
hypothesis_profiles.register()
