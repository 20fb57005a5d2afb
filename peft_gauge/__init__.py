"""Instruments for measuring, predicting and comparing parameter-efficient fine-tuning.

`plan`, `compare` and `read_run` are the Python interface (`peft_gauge.api`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_gauge.api import compare, plan, read_run
    from peft_gauge.errors import GaugeError

__version__ = "0.1.0"
__all__ = ["GaugeError", "__version__", "compare", "plan", "read_run"]


def __getattr__(name: str) -> Any:
    """Imported on first use: ``import peft_gauge`` alone takes no time."""
    if name == "GaugeError":
        from peft_gauge import errors

        return errors.GaugeError
    if name in __all__:
        from peft_gauge import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
