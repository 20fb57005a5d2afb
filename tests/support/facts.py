"""Texts are compared by their facts: names, numbers and options, which a message may phrase as it likes."""

from __future__ import annotations


def lacking(text: str, *facts: str) -> list[str]:
    """Those of ``facts`` that ``text`` does not contain, where runs of whitespace count as one space."""
    flat = " ".join(text.split())
    return [fact for fact in facts if " ".join(fact.split()) not in flat]
