"""What a node says of itself before it trains. No torch here: a device answers in a process of its own."""

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from slt_planner.config import Record

MEASURED = "measured"


class Introduction(Record):
    """Who a node is, as its node config says.

    `client` is its number (``partition-id``; None: any that is free), `tier` its device class; with the tier
    ``measured`` that is the largest whose budget is within `free_bytes`, the memory that was free beside a process with
    torch in it.
    Without a tier it is in the one that the run dealt it. `own_images`: it trains on images of its own (``dataset``).
    """

    client: int | None = Field(default=None, ge=0)
    tier: str | None = None
    free_bytes: int | None = Field(default=None, ge=0)
    own_images: bool = False


def introduction(node_config: Mapping[str, object]) -> Introduction:
    """That of this machine.

    >>> introduction({"partition-id": 2, "num-partitions": 3, "tier": "64MB"})
    Introduction(client=2, tier='64MB', free_bytes=None, own_images=False)
    """
    tier = node_config.get("tier")
    own = {
        "client": node_config.get("partition-id"),
        "tier": tier,
        "free_bytes": free_memory() if tier == MEASURED else None,
        "own_images": bool(node_config.get("dataset")),
    }
    return Introduction.model_validate(own)


def free_memory() -> int | None:
    """Bytes that this machine can give out beside this process with torch in it, as Linux estimates it; elsewhere all
    that it has. None: not known.
    """
    import torch  # noqa: F401 - a client that trains has it in memory, too

    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
