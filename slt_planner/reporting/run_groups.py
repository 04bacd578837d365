"""Runs put together: those that repeat one another with another seed, and what is said of each."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import stdev

from slt_planner.federated.result import RoundRow, RunResult, RunTier
from slt_planner.reporting.words import count, scale_text, shorten

Confusion = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RunGroup:
    """Finished runs that differ in their seed alone, or one stopped run; each member with its own name."""

    label: str
    members: tuple[tuple[str, RunResult], ...]

    @property
    def runs(self) -> tuple[RunResult, ...]:
        """The runs without their names."""
        return tuple(run for _, run in self.members)


@dataclass(frozen=True)
class Curve:
    """A group's accuracy, a value a round that was evaluated: the mean over its seeds, the lowest and the highest.

    `bytes_up` are those uploaded so far, the mean over the seeds; `rows` those of the first seed.
    """

    rows: list[RoundRow]
    mean: list[float]
    low: list[float]
    high: list[float]
    bytes_up: list[float]

    @classmethod
    def of(cls, group: RunGroup) -> "Curve":
        """A group's runs have equally many rounds, and the same ones were evaluated."""
        first, *others = group.runs
        judged = [place for place, row in enumerate(first.rows) if row.accuracy is not None]
        by_round = [[run.rows[place].accuracy or 0.0 for run in (first, *others)] for place in judged]
        uploads = list(zip(*(accumulate(row.bytes_up for row in run.rows) for run in group.runs), strict=True))
        return cls(
            rows=[first.rows[place] for place in judged],
            mean=[sum(values) / len(values) for values in by_round],
            low=[min(values) for values in by_round],
            high=[max(values) for values in by_round],
            bytes_up=[sum(uploads[place]) / len(uploads[place]) for place in judged],
        )

    @property
    def rounds(self) -> list[int]:
        """The numbers of the rounds that were evaluated."""
        return [row.round for row in self.rows]

    @property
    def stage_begins(self) -> list[int]:
        """Which of the evaluated rounds are the first of a stage other than the first one."""
        stages = [row.stage for row in self.rows]
        return [place for place in range(1, len(stages)) if stages[place] != stages[place - 1]]


def run_labels(results: Sequence[RunResult]) -> list[str]:
    """A name for each run, numbered where several would have the same.

    A run's own title is its strategy and seed; two plans' runs can share it.
    """
    titles = [result.title for result in results]
    labels = []
    for index, title in enumerate(titles):
        alike = titles[:index].count(title)
        labels.append(f"{title} ({alike + 1})" if titles.count(title) > 1 else title)
    return labels


def run_groups(results: Sequence[RunResult]) -> list[RunGroup]:
    """Runs put together that repeat one another with another seed; a stopped run stays alone."""
    found: list[tuple[object, list[tuple[str, RunResult]]]] = []
    for label, result in zip(run_labels(results), results, strict=True):
        settings = result.settings.model_dump(exclude={"seed"})
        key = (settings, result.plan, result.dataset_title, result.head_scale, len(result.rows))
        alike = next((runs for other, runs in found if other == key), None)
        if alike is None or result.status == "stopped":
            found.append((key if result.status == "finished" else object(), [(label, result)]))
        else:
            alike.append((label, result))
    groups: list[RunGroup] = []
    for _, labelled in found:
        label, first = labelled[0]
        if len(labelled) > 1:
            label = f"{first.settings.strategy}, {len(labelled)} seeds"
        elif first.status == "stopped":
            label = f"{label} (stopped)"
        earlier = [group.label for group in groups]
        if label in earlier:
            label = f"{label} ({sum(other.startswith(label) for other in earlier) + 1})"
        groups.append(RunGroup(label, tuple(labelled)))
    return groups


def mean(numbers: Sequence[float | None]) -> float | None:
    """The mean of the numbers that are there, None where none is."""
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None


def tightest_tier(result: RunResult) -> RunTier | None:
    """The tier whose clients came nearest to their budget."""
    measured = [tier for tier in result.tiers if tier.measured_peak_bytes is not None]
    return max(measured, key=lambda tier: (tier.measured_peak_bytes or 0) / tier.budget_bytes, default=None)


def head_scales(result: RunResult) -> str:
    """The head scales a run went through: its one width, or the first and the last."""
    scales = [row.config.head_scale for row in result.rows] or [stage.head_scale for stage in result.plan.stages]
    if result.head_scale is not None or min(scales) == max(scales):
        return scale_text(result.head_scale or scales[0])
    return f"{100 * scales[0]:.3g} to {scale_text(scales[-1])}"


def round_seconds(result: RunResult) -> float | None:
    """Mean seconds of a round."""
    return mean([row.seconds for row in result.rows])


def metric_title(results: Sequence[RunResult]) -> str:
    """What the runs are judged by, in words."""
    words = {"accuracy": "accuracy", "mean_iou": "mean IoU"}
    return " or ".join(dict.fromkeys(words[result.metric] for result in results)) or words["accuracy"]


def stopped_sentence(label: str, result: RunResult) -> str:
    """That a run was stopped, and after which round."""
    done = (
        f"after round {result.rows[-1].round} of {result.settings.rounds}"
        if result.rows
        else "before its first round ended"
    )
    return f"{label} was stopped {done}: its figures are not final"


def unused_words(run: RunResult) -> str:
    """How many updates were refused, and why most often; in how many rounds none was used. Empty if all is well."""
    reasons = Counter(re.sub(r"[0-9.e+]+ times", "many times", own.reason) for row in run.rows for own in row.refusals)
    idle = sum(row.clients == row.dropped_out + row.stragglers + row.refused for row in run.rows)
    parts = []
    if reasons:
        most_often = shorten(reasons.most_common(1)[0][0])
        parts.append(f"{count(sum(reasons.values()), 'update')} refused (most often: {most_often})")
    if idle:
        parts.append(f"no update was used in {idle} of {count(len(run.rows), 'round')}")
    return "; ".join(parts)


def sitting_out_words(run: RunResult) -> str:
    """Whose clients never trained; empty where all could."""
    tiers = [tier for tier in run.tiers if tier.clients and not tier.takes_part]
    clients = sum(tier.clients for tier in run.tiers)
    names = ", ".join(shorten(tier.name, 24) for tier in tiers)
    out = sum(tier.clients for tier in tiers)
    return f"{out:,} of {count(clients, 'client')} sit out ({names}): nothing of the method fits them" if tiers else ""


def dataset_titles(results: Sequence[RunResult]) -> str:
    """The data that accuracies were measured on."""
    return "; ".join(dict.fromkeys(shorten(result.dataset_title, 80) for result in results))


def spread(numbers: Sequence[float | None]) -> float | None:
    """The sample standard deviation of the numbers that are there, None where they are fewer than two.

    >>> spread([0.25, 0.75, None]), spread([0.5])
    (0.3535533905932738, None)
    """
    known = [number for number in numbers if number is not None]
    return stdev(known) if len(known) > 1 else None


def confusion(group: RunGroup) -> Confusion | None:
    """How often each class was given (rows) and predicted (columns), all seeds together; None where it is not known."""
    counts = [run.confusion for run in group.runs if run.confusion]
    if not counts:
        return None
    return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*counts, strict=True))


def class_accuracies(group: RunGroup) -> list[float | None] | None:
    """The share of each class's test images that are classified rightly; None for a class without an image."""
    counts = confusion(group)
    if counts is None:
        return None
    return [row[number] / sum(row) if sum(row) else None for number, row in enumerate(counts)]
