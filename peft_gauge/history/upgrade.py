"""Translate saved runs of older schemas to the newest schema.

The files stay as they were written; only the data read from them is translated.
"""

from __future__ import annotations

from typing import Any

from peft_gauge.history.schema import VERSION

# Schema 2 -> 3: the field's own words.
CASE_KEYS = {"question": "benchmark", "figures": "metrics"}
CLAIM_KEYS = {"figure": "metric"}
METRIC_KEYS = {
    "card": "gpu",
    "figure": "metric",
    "comparisons_with_cannot_tell": "comparisons_with_inconclusive",
    "dequantised_temporaries": "dequantized_temporaries",
    "looks": "analyses",
    "planted_rank": "synthetic_rank",
    "planted_targets": "synthetic_targets",
    "quantisation_constants": "quantization_constants",
    "share_of_copy": "mbu",
    "share_of_product": "mfu",
    "update_over_planted": "update_over_synthetic",
}
VERDICTS = {"cannot tell": "inconclusive"}
# Settings that older runs did not have, with the value that every one of them had: else no case could be compared.
SETTINGS = {"mixed_precision": "no", "float32_outputs": False}
OF_A_STEP = "grad_checkpointing"  # is among the settings of every step, measured or planned


def upgraded(section: dict[str, Any]) -> dict[str, Any]:
    """``section``, the part of a run under `peft_gauge.history.schema.KEY`, with the keys and verdicts of schema 3.

    A section of the newest schema is returned unchanged, and so is any part without the expected shape: the reader
    reports it.
    """
    schema = section.get("schema")
    if type(schema) is not int or not 1 <= schema < VERSION:
        return section
    found = dict(section)
    for name, upgrade in (("cases", _case), ("claims", _claim)):
        if isinstance(section.get(name), list):
            found[name] = [upgrade(each) if isinstance(each, dict) else each for each in section[name]]
    return found


def _case(case: dict[str, Any]) -> dict[str, Any]:
    found = _renamed(case, CASE_KEYS)
    if "metrics" in found:
        found["metrics"] = _metrics(found["metrics"])
    return found


def _claim(claim: dict[str, Any]) -> dict[str, Any]:
    found = _renamed(claim, CLAIM_KEYS)
    verdict = found.get("verdict")
    return {**found, "verdict": VERDICTS.get(verdict, verdict)} if isinstance(verdict, str) else found


def _metrics(value: Any) -> Any:
    """Translate keys at any depth, and verdicts, which are values or, where verdicts are counted, keys."""
    if isinstance(value, dict):
        if OF_A_STEP in value:
            value = {**value, **SETTINGS}
        return {METRIC_KEYS.get(name, VERDICTS.get(name, name)): _metrics(each) for name, each in value.items()}
    if isinstance(value, list):
        # Rounds and samples are long and hold numbers only.
        return value if value and isinstance(value[0], int | float) else [_metrics(each) for each in value]
    return VERDICTS.get(value, value) if isinstance(value, str) else value


def _renamed(holder: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    return {keys.get(name, name): value for name, value in holder.items()}
