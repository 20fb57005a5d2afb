"""Ranks that end in the way their environment names, under the suite's own launcher."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from peft_gauge.measure import ranks

FAILS = "PLANTED_RANK_FAILS"
RANK = ranks.rank


def launch(shared: ranks.SharedCase) -> list[dict[str, Any]]:
    ranks.rank = planted
    return ranks.launch(shared)


def planted(shared: ranks.SharedCase) -> dict[str, Any]:
    """Rank 1 fails; rank 0 waits for it, as in a collective."""
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
