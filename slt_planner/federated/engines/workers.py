"""The worker engine: several clients of a round at once, each in a process of its own, on one thread."""

import io
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from slt_planner.errors import SltError
from slt_planner.federated.engines.base import Assignment
from slt_planner.federated.engines.local import LocalEngine, SentModels, Trained, train_assignment
from slt_planner.federated.progress import Holders
from slt_planner.federated.setup import Run
from slt_planner.federated.strategies.base import ServerState


class WorkerEngine(LocalEngine):
    """Clients in processes of this machine; the run is the one that a single thread makes, to the bit.

    The processes are forked in each round, so they have its weights, the network and the images without a copy. A
    forked process can't use torch's pool of threads, so each trains on one; when that is faster: docs/training.md.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def train_cohort(
        self, run: Run, state: ServerState, cohort: Sequence[Assignment], holders: Holders
    ) -> Generator[Trained]:
        """As `LocalEngine.train_cohort`; at most twice as many clients as there are workers are ahead of what is taken.

        Raises:
            SltError: a worker was killed.
        """
        context, work = multiprocessing.get_context("fork"), (run, state, cohort)
        pool = ProcessPoolExecutor(self._workers, context, initializer=_begin, initargs=work)
        asked: deque[Future[tuple[bytes, float]]] = deque()
        try:
            for place in range(len(cohort)):
                while place + len(asked) < min(len(cohort), place + 2 * self._workers):
                    asked.append(pool.submit(_train, place + len(asked)))
                packed, loss = asked.popleft().result()
                yield torch.load(io.BytesIO(packed), weights_only=True), loss
        except BrokenProcessPool as error:
            raise SltError(
                "a worker was killed, perhaps because the machine is out of memory; "
                "go on with slt-train --resume, or use fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_work: tuple[Run, ServerState, Sequence[Assignment], SentModels]  # of the round that a worker was forked in


def _begin(run: Run, state: ServerState, cohort: Sequence[Assignment]) -> None:
    """Make a worker of a forked process: one that ends with its parent, and leaves Ctrl-C to it."""
    global _work
    _work = run, state, cohort, SentModels(run, state)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _train(place: int) -> tuple[bytes, float]:
    """What a client of the cohort trained, packed, and its loss."""
    run, state, cohort, sent = _work
    trained, loss = train_assignment(run, state, cohort[place], sent)
    packed = io.BytesIO()
    torch.save(trained, packed)
    return packed.getvalue(), loss
