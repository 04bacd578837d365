"""Rounds as they come, on a terminal or piped."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slt_planner.config import Metric
from slt_planner.federated.result import RoundRow


class LiveRounds:
    """A bar on a terminal, a plain line a round otherwise; as a context."""

    def __init__(self, title: str, rounds: int, metric: Metric, console: Console) -> None:
        self._title, self._rounds, self._console = title, rounds, console
        self._metric = metric.replace("_", " ")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=rounds)

    def __enter__(self) -> "LiveRounds":
        """Begin to show."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The bar goes."""
        self._bar.stop()

    def show(self, row: RoundRow) -> None:
        """Show a finished round."""
        figures = [f"stage {row.stage}", str(row.config)]
        if row.accuracy is not None:
            figures.append(f"{self._metric} {row.accuracy:.1%}")
            figures.append("loss not finite" if row.loss is None else f"loss {row.loss:.3f}")
        elif row.train_loss is not None:
            figures.append(f"training loss {row.train_loss:.3f}")
        figures += _trouble(row)
        brief = str(row.config) if row.accuracy is None else f"{row.config} {row.accuracy:.1%}"
        self._bar.update(self._task, completed=row.round, description=f"{self._title} {brief}")
        if not self._console.is_terminal:
            line = "  ".join([f"{self._title} round {row.round}/{self._rounds}", *figures, f"{row.seconds:.1f} s"])
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _trouble(row: RoundRow) -> list[str]:
    """Clients whose work was not used."""
    counts = {"dropped out": row.dropped_out, "too late": row.stragglers, "refused": row.refused}
    words = [f"{count} {what}" for what, count in counts.items() if count]
    return [f"of {row.clients} clients " + ", ".join(words)] if words else []
