"""Plan the memory of a training step without the device."""

import sys
from types import ModuleType
from typing import Any


class _Plan(ModuleType):
    """This package, which can be called: ``peft_gauge.plan(…)`` is `peft_gauge.api.plan`, and an imported subpackage
    takes the place of a function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from peft_gauge import api

        return api.plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Plan
