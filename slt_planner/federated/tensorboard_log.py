"""A run's rounds as TensorBoard reads them, beside metrics.jsonl and made from the same rows."""

from collections.abc import Sequence
from pathlib import Path

from slt_planner.federated.result import RoundRow
from slt_planner.federated.run_folder import remove_events


class TensorboardLog:
    """The log of a run: begun anew with the rows that there are, so that no round is in it twice.

    What is added is on disk at once.
    """

    def __init__(self, folder: Path, rows: Sequence[RoundRow]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only runs need it

        remove_events(folder)
        self._writer = SummaryWriter(str(folder))
        for row in rows:
            self._write(row)
        self._writer.flush()

    def close(self) -> None:
        """Nothing is added after this."""
        self._writer.close()

    def add(self, row: RoundRow) -> None:
        """Add a round."""
        self._write(row)
        self._writer.flush()

    def _write(self, row: RoundRow) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row.round)


def scalars(row: RoundRow) -> dict[str, float]:
    """The numbers of a round that are drawn, by their tags; those that there are."""
    known = {
        "test/accuracy": row.accuracy,
        "test/loss": row.loss,
        "train/loss": row.train_loss,
        "train/learning_rate": row.learning_rate,
        "train/flops": row.train_flops,
        "schedule/stage": row.stage,
        "schedule/head_scale": row.config.head_scale,
        "traffic/bytes_up": row.bytes_up,
        "traffic/bytes_down": row.bytes_down,
        "clients/refused": row.refused,
        "clients/dropped_out": row.dropped_out,
        "clients/stragglers": row.stragglers,
        "time/round_s": row.seconds,
        "time/train_s": row.train_seconds,
        "time/evaluate_s": row.evaluate_seconds,
        **{f"peak_bytes/{tier}": peak for tier, peak in row.measured_peak_bytes.items()},
    }
    return {name: value for name, value in known.items() if value is not None}
