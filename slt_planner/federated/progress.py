"""What a run's coming rounds depend on beside the weights: small records that are part of its state. No torch here."""

from collections.abc import Iterable

from pydantic import Field

from slt_planner.config import Record

REMEMBERED_CHANGES = 100


class Plateau(Record):
    """How a stage's training loss is doing (`rounds_policy` ``plateau``).

    `best_loss` is the lowest mean training loss of a round of `stage`, and `waited` how many rounds there were since
    one that was lower by the threshold.
    """

    stage: int = Field(default=0, ge=0)
    best_loss: float | None = None
    waited: int = Field(default=0, ge=0)

    def after(self, stage: int, loss: float | None, patience: int, threshold: float) -> "Plateau":
        """After a round of `stage`, with the mean training loss of its clients (None: no update was valid).

        A loss counts as lower if it is below (1 - threshold) times the best one of the stage; after `patience` rounds
        without one, the next stage begins.

        >>> Plateau(best_loss=1.0, waited=2).after(stage=0, loss=0.995, patience=3, threshold=0.01)
        Plateau(stage=1, best_loss=None, waited=0)
        """
        now = self if stage == self.stage else Plateau(stage=stage)
        if loss is None:
            return now
        if now.best_loss is None or loss < now.best_loss * (1 - threshold):
            return Plateau(stage=stage, best_loss=loss)
        if now.waited + 1 >= patience:
            return Plateau(stage=stage + 1)
        return now.model_copy(update={"waited": now.waited + 1})


class Holders(Record):
    """The clients, ascending, that have the weights which nobody trains in a stage: those of units 1..depth."""

    stage: int = Field(default=0, ge=0)
    depth: int = Field(default=0, ge=0)
    clients: tuple[int, ...] = ()

    def of(self, stage: int, depth: int) -> "Holders":
        """Those of a stage with this many unchanging units: nobody, if that is another one."""
        return self if (stage, depth) == (self.stage, self.depth) else Holders(stage=stage, depth=depth)

    def joined_by(self, clients: Iterable[int]) -> "Holders":
        """With clients that get these weights now; where there are none, nobody is remembered."""
        if self.depth == 0:
            return self
        return self.model_copy(update={"clients": tuple(sorted({*self.clients, *clients}))})


class Progress(Record):
    """Where a run is, beside its round and its weights.

    `recent_changes` is how far the last updates moved the weights (`refusals`), the latest last.
    """

    plateau: Plateau = Plateau()
    holders: Holders = Holders()
    recent_changes: tuple[float, ...] = ()

    def remembering(self, changes: Iterable[float]) -> "Progress":
        """With the changes of a round, and the last 100 of all."""
        return self.model_copy(update={"recent_changes": (*self.recent_changes, *changes)[-REMEMBERED_CHANGES:]})
