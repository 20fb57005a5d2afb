"""The suite as a pytest plugin: options, selection, parametrisation, recording, saving and the summary.

pytest loads ``hooks`` (through `pytest_plugins` of the root ``conftest.py``, or ``-p``). ``options`` has the suite's
own options, ``selection`` turns them into cases, ``shards`` splits them, ``workload`` lists the steps that a session
plans and measures, ``recorder`` saves the run, ``budget`` orders it, ``workers`` supports pytest-xdist, and ``bench``
starts pytest for ``peft-gauge bench``.

Only this part of the package imports pytest, and only `peft_gauge.commands` imports it.
"""
