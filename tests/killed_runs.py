"""Runs that are killed with SIGKILL, again and again, and go on; a program of its own, so that it can fork.

    python -m tests.killed_runs FOLDER SEED MOMENTS

makes the run FOLDER/whole at one go, and FOLDER/killed-0, killed-1, ... of the same settings: each is begun in a
process of its own that is killed at a random moment, and continued to its end in another one. Even ones are killed
right before or after a random file is renamed into its place.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from slt_planner.federated.experiment import begin_run, continue_run
from slt_planner.federated.run_folder import METRICS, SETTINGS, SPLIT
from slt_planner.planning.plan import load_plan
from tests.unit import tiny_runs

import_module("torch.utils.tensorboard")  # once, not in every child

CHANGES = {"rounds": 9, "checkpoint_every": 2, "client_dropout": 0.1, "rounds_policy": "plateau"}


def in_child(work: Callable[[], object], begun: Path | None = None, killed_after_s: float = 0) -> int:
    """Do it in a forked process; the signal that ended it, or 0.

    With `begun` it is killed some seconds after that file is there.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if begun is not None:
        wait_for(begun)
        time.sleep(killed_after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a run failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def wait_for(file: Path) -> None:
    """Until a file is there."""
    while not file.exists():
        time.sleep(0.001)


def kill_at_rename(number: int, before: bool) -> None:
    """This process dies at its `number`-th renaming of a file."""
    replace, done = os.replace, [0]

    def deadly(source: str, target: str) -> None:
        done[0] += 1
        if done[0] == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if done[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly  # type: ignore[assignment]


def go(plan: Path, path: Path, deadly_rename: tuple[int, bool] | None = None) -> None:
    """Begin or continue a run, to its end or that of this process."""
    run = tiny_runs.prepared(load_plan(plan), tiny_runs.dataset(), **CHANGES)
    if deadly_rename:
        kill_at_rename(*deadly_rename)
    if not (path / SETTINGS).exists():
        begin_run(run, path, force=True)
    continue_run(run, path)


def main(folder: Path, seed: int, moments: int) -> None:
    # All work is done in children: torch does not train in a process that was forked from one that did.
    plan, whole, chance = folder / "plan.json", folder / "whole", random.Random(seed)
    in_child(lambda: tiny_runs.scheduled_plan().save(plan))
    in_child(partial(go, plan, whole))
    duration = (whole / SETTINGS).stat().st_mtime - (whole / SPLIT).stat().st_mtime  # of its rounds
    killed = [folder / f"killed-{number}" for number in range(moments)]
    for number, path in enumerate(killed):
        if number % 2:
            ended = in_child(partial(go, plan, path), path / SETTINGS, chance.uniform(0, duration))
        else:
            ended = in_child(partial(go, plan, path, (chance.randint(1, 10), chance.random() < 0.5)))
        metrics = path / METRICS
        rounds = metrics.read_text().count("\n") if metrics.exists() else 0
        print(f"{path.name}: ended by signal {ended}, {rounds} of {CHANGES['rounds']} rounds are there", flush=True)
    in_child(lambda: [go(plan, path) for path in killed])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
