"""How long training steps take on this machine, next to one another."""

import time
from statistics import median

import torch

from slt_planner.memory.step import SteadyStep

_LEAST_PAIRS, _MOST_PAIRS = 3, 50


def paired_times(plain: SteadyStep, other: SteadyStep, enough_s: float = 1.0) -> tuple[float, float]:
    """Median seconds of a step, and its median ratio to the plain one; they run by turns, for about `enough_s`."""
    pairs: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(pairs) < _LEAST_PAIRS or (len(pairs) < _MOST_PAIRS and time.perf_counter() - began < enough_s):
        pairs.append((_seconds(plain), _seconds(other)))
    ratio = 1.0 if other is plain else median(own / of_plain for of_plain, own in pairs)
    return median(own for _, own in pairs), ratio


def _seconds(step: SteadyStep) -> float:
    """How long a step takes, without making its batch."""
    batch, labels = step.example_batch()
    _wait_for(step.device)
    began = time.perf_counter()
    step.train(batch, labels)
    _wait_for(step.device)
    return time.perf_counter() - began


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
