"""The suite as a pytest plugin: options, selection, parametrisation, recording, saving and the summary.

``hooks`` is the module that pytest loads (`pytest_plugins` of the root ``conftest.py``, or ``-p``); ``options`` are the
suite's own, ``selection`` makes cases of them, ``workload`` is what a session needs planned and measured, ``recorder``
saves the run, ``budget`` orders it, ``workers`` are those of pytest-xdist, and ``bench`` starts pytest for
``peft-gauge bench``.

This is the one place of the package that imports pytest. Nothing but `peft_gauge.commands` imports it.
"""
