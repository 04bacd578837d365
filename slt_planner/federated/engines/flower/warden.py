"""A process that outlives the one that started a federation, to end what that one has left; standard library alone.

    python warden.py MARK

waits until its standard input is closed, as it is when that process ends in any way, `kill -9` too. Then it ends all
processes that have MARK in their environment.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_LONGEST_S, _POLL_S = 10.0, 0.1


def marked(mark: str) -> list[int]:
    """The ids of the other processes with NAME=VALUE in the environment they began with; none where /proc is not."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is another user's
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def end_marked(mark: str) -> None:
    """Kill them, and those that they start meanwhile."""
    until = time.monotonic() + _LONGEST_S
    while (left := marked(mark)) and time.monotonic() < until:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)  # what is killed takes a moment to be gone


if __name__ == "__main__":
    sys.stdin.read()
    end_marked(sys.argv[1])
