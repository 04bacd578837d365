"""Runs or plans compared, as a table that goes into a paper: CSV, Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slt_planner.planning.plan import Plan
from slt_planner.reporting.run_groups import RunGroup, head_scales, mean, round_seconds, spread, tightest_tier
from slt_planner.reporting.words import model_title, percent, short_scale, shorten
from slt_planner.units import short_bytes

if TYPE_CHECKING:
    import pandas as pd

FORMATS: Mapping[str, str] = {"csv": "CSV", "md": "Markdown", "tex": "LaTeX"}
"""Suffixes of the files that a table is written to, and what they are called."""


@dataclass(frozen=True)
class Summary:
    """A group of runs in one row; figures are means over its seeds, None where they are not known.

    `accuracy` is the mean of the last five rounds of a run that were evaluated, `spread` its sample standard deviation
    over the seeds (None: fewer than two). `peak_bytes` is of the tier nearest to its budget, the highest of all seeds.
    """

    label: str
    strategy: str
    seeds: int
    width: str
    rounds: int
    judged_rounds: int
    accuracy: float | None
    spread: float | None
    accuracy_batch_statistics: float | None
    accuracy_running_statistics: float | None
    bytes_up: float | None
    bytes_down: float | None
    peak_bytes: int | None
    budget_bytes: int | None
    round_s: float | None

    @classmethod
    def of(cls, group: RunGroup) -> "Summary":
        """What a group of runs comes to."""
        runs = group.runs
        tiers = [tier for tier in map(tightest_tier, runs) if tier is not None]
        nearest = max(tiers, key=lambda tier: (tier.measured_peak_bytes or 0) / tier.budget_bytes, default=None)
        last = [run.mean_last_accuracy for run in runs]
        return cls(
            label=group.label,
            strategy=runs[0].settings.strategy,
            seeds=len(runs),
            width=head_scales(runs[0]),
            rounds=len(runs[0].rows),
            judged_rounds=sum(row.accuracy is not None for row in runs[0].rows),
            accuracy=mean(last),
            spread=spread(last),
            accuracy_batch_statistics=mean([run.accuracy_batch_statistics for run in runs]),
            accuracy_running_statistics=mean([run.accuracy_running_statistics for run in runs]),
            bytes_up=mean([run.bytes_up for run in runs]),
            bytes_down=mean([sum(row.bytes_down for row in run.rows) for run in runs]),
            peak_bytes=nearest.measured_peak_bytes if nearest else None,
            budget_bytes=nearest.budget_bytes if nearest else None,
            round_s=mean([round_seconds(run) for run in runs]),
        )


def run_comparison(groups: Sequence[RunGroup]) -> "pd.DataFrame":
    """A row a group of runs; accuracies in percent, amounts in MB, spreads as sample standard deviations."""
    import pandas as pd

    return pd.DataFrame([_run_row(Summary.of(group)) for group in groups])


def _run_row(own: Summary) -> dict[str, object]:
    return {
        "strategy": own.strategy,
        "seeds": own.seeds,
        "width": own.width,
        "rounds": own.rounds,
        "accuracy (%)": _hundred(own.accuracy),
        "spread": _hundred(own.spread),
        "running statistics (%)": _hundred(own.accuracy_running_statistics),
        "up (MB)": _megabytes(own.bytes_up),
        "down (MB)": _megabytes(own.bytes_down),
        "peak (MB)": _megabytes(own.peak_bytes, 2),
        "budget (MB)": _megabytes(own.budget_bytes, 2),
        "s a round": _rounded(own.round_s, 1),
    }


def plan_comparison(labelled: Sequence[tuple[str, Plan]]) -> "pd.DataFrame":
    """A row a tier of each plan; amounts in MB."""
    import pandas as pd

    rows: list[dict[str, object]] = []
    for name, plan in labelled:
        for tier in plan.tiers:
            shared: dict[str, object] = {
                "plan": shorten(name, 40),
                "tier": shorten(tier.name, 24),
                "budget (MB)": _megabytes(tier.budget_bytes, 3),
                "batch": plan.batch_size,
                "status": tier.status,
            }
            peaks = [stage.peak_bytes for stage in tier.stages]
            own: dict[str, object] = {
                "stages": len(peaks) or None,
                "first head": f"{short_scale(tier.stages[0].head_scale)} %" if peaks else None,
                "full width from stage": next((n for n, s in enumerate(tier.stages) if s.head_scale == 1.0), None),
                "most frozen": max((stage.freeze_depth for stage in tier.stages), default=None),
                "tightest": percent(max(peaks) / tier.budget_bytes) if peaks else None,
                "whole network (MB)": _megabytes(plan.full_network.peak_bytes),
            }
            rows.append(shared | own)
    integers = ("stages", "full width from stage", "most frozen")
    return pd.DataFrame(rows).astype(dict.fromkeys(integers, "Int64"))


def plan_labels(plans: Sequence[Plan]) -> list[str]:
    """A name for each plan: its model and budgets, numbered where several would have the same."""
    titles = []
    for plan in plans:
        budgets = [short_bytes(tier.budget_bytes) for tier in plan.tiers]
        titles.append(f"{model_title(plan)}, {shorten(', '.join(budgets), 30)}")
    counts = [titles[:place].count(title) + 1 for place, title in enumerate(titles)]
    several = [titles.count(title) > 1 for title in titles]
    return [
        f"{title} ({number})" if many else title for title, number, many in zip(titles, counts, several, strict=True)
    ]


def table_texts(frame: "pd.DataFrame") -> dict[str, str]:
    """The table in each of `FORMATS`; what is not known is left empty."""
    words = frame.apply(_column_words)
    markdown = words.map(lambda cell: cell.replace("|", "\\|") if isinstance(cell, str) else cell)
    return {
        "csv": frame.to_csv(index=False, lineterminator="\n"),
        "md": markdown.to_markdown(index=False, disable_numparse=True, colalign=_alignment(frame)) + "\n",
        "tex": words.to_latex(index=False, escape=True, column_format="".join(side[0] for side in _alignment(frame))),
    }


def _column_words(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """A column's cells as words, numbers with as many decimal places as one of them has."""
    known = [cell for cell in column if isinstance(cell, float) and cell == cell]
    places = max((len(str(cell).partition(".")[2].rstrip("0")) for cell in known), default=0)
    return column.map(
        lambda cell: f"{cell:.{places}f}" if isinstance(cell, float) else str(cell), na_action="ignore"
    ).where(column.notna(), "")


def _alignment(frame: "pd.DataFrame") -> list[str]:
    from pandas.api.types import is_numeric_dtype

    return ["right" if is_numeric_dtype(frame[name]) else "left" for name in frame.columns]


def _hundred(fraction: float | None) -> float | None:
    return _rounded(None if fraction is None else 100 * fraction, 2)


def _megabytes(number: float | None, digits: int = 1) -> float | None:
    return _rounded(None if number is None else number / 1e6, digits)


def _rounded(number: float | None, digits: int) -> float | None:
    return None if number is None else round(number, digits)
