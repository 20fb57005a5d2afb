"""The error for a method that cannot be planned, and its translation from torch's own errors."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft_gauge._internals.torch import NEEDS_VALUES
from peft_gauge.errors import GaugeError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator


class CannotPlan(GaugeError):
    """An operation of the method needs values that no policy supplies; the message names it."""


@contextmanager
def translated() -> Iterator[None]:
    """Turn an error about missing values in this block into `CannotPlan`; other errors pass."""
    try:
        yield
    except (*NEEDS_VALUES, NotImplementedError, GaugeError) as error:
        cause = _value_error(error)
        if cause is None or isinstance(error, CannotPlan):
            raise
        raise CannotPlan(operation(cause)) from error


def _value_error(error: BaseException | None) -> BaseException | None:
    while error is not None and not isinstance(error, (*NEEDS_VALUES, NotImplementedError)):
        error = error.__cause__
    return error


def operation(error: BaseException) -> str:
    """The operation that failed, from torch's error."""
    operator = getattr(error, "func", None)
    if operator is not None:
        return f"{operator} needs the values of its input"
    return f"{type(error).__name__}: {one_line(error, 200)}"
