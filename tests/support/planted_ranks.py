"""Ranks that end in the way that `launch` is given, under the suite's own launcher."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_gauge.measure import ranks

FAILS = "PLANTED_RANK_FAILS"
STARTED = "PLANTED_RANKS_STARTED"
RANK = ranks.rank


def launch(
    shared: ranks.SharedCase, way: str, started: str, start: str, environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The records of ranks that end in a ``way``.

    Each first leaves a file with its process id as the name in the folder ``started``. ``start``: "spawn", as all ranks
    are started, or "fork", which spares their imports. ``environment``: that of the launcher and its ranks, besides.
    """
    os.environ.update({**environment, FAILS: way, STARTED: started})
    _start_by(start)
    ranks.rank = planted
    return ranks.launch(shared)


def launch_on_one_thread(shared: ranks.SharedCase, start: str) -> list[dict[str, Any]]:
    """`ranks.launch`, where each rank computes on one thread: two of a rank would wait for each other's core."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # a forked rank has read the variable before
    _start_by(start)
    return ranks.launch(shared)


def _start_by(start: str) -> None:
    from torch.distributed.launcher import api

    config = api.LaunchConfig
    vars(api)["LaunchConfig"] = lambda **options: config(**{**options, "start_method": start})


def planted(shared: ranks.SharedCase) -> dict[str, Any]:
    """Rank 1 fails; rank 0 waits for it, as in a collective."""
    Path(os.environ[STARTED], str(os.getpid())).touch()
    if os.environ[FAILS] == "shows its port":
        return {"rank": int(os.environ["RANK"]), "port": int(os.environ["MASTER_PORT"])}
    if os.environ[FAILS] == "has another PEFT":
        if os.environ["RANK"] == "1":
            own = ranks.versions()
            ranks.versions = lambda: {**own, "peft": "0.0.1"}
        return RANK(shared)
    from torch.distributed.elastic.multiprocessing.errors import record

    recorded: Any = record(_fail)
    found: dict[str, Any] = recorded()
    return found


def _fail() -> dict[str, Any]:
    if os.environ["RANK"] == "0" or os.environ[FAILS] == "hangs":
        time.sleep(600)
    if os.environ[FAILS] == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
