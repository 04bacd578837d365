"""What a federated run leaves: its settings, one row a round, and its totals. Records only, no torch."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from slt_planner.config import Config, Metric, Record
from slt_planner.planning.plan import Plan
from slt_planner.units import parse_bytes

if TYPE_CHECKING:
    import pandas as pd


StrategyName = Literal["slt", "small", "full", "federated-dropout", "fedrolex", "heterofl", "fjord", "fedolf"]

TIMING_FIELDS = frozenset({"train_seconds", "evaluate_seconds", "seconds"})
"""What differs in the rows of a run that is made again; everything else is the same to the bit."""


class RunSettings(Record):
    """Everything but the plan that a run is made from; saved, with the plan, as config.json.

    `dataset` is what `load_dataset` takes, and `data_root` where it looks for data sets that have a name alone;
    `partition` is ``iid``, ``dirichlet:ALPHA``, ``shards:N`` or ``natural``, with at least `minimum_samples` training
    images a client. The learning rate falls from `learning_rate` to `final_learning_rate` by cosine over the
    rounds. With `augment` images are cropped and flipped at random, if they are such that this makes sense (`Dataset`).
    With `enforce` clients train under their tier's budget. Of several `workers` each is a process that trains a
    client on one thread; without, clients train one after the other, on as many threads as the plan's step. With
    `prefix_cache`, such as ``1GB``, what frozen prefixes give for clients' images is kept in that much memory. Of more
    than one `batched_clients` so many train at once, their weights stacked, where they train alike. `device` is where
    all of it is computed; a plan's own device is where its clients' memory was measured.

    The test images are evaluated every `evaluate_every` rounds and after the last, the state is kept every
    `checkpoint_every`. `client_dropout` and `stragglers` are the probabilities that a chosen client never answers, and
    that it answers too late; `max_change` times the usual change of the weights is what an update may bring
    (`refusals.Screen`). With the `rounds_policy` ``plateau`` a stage also ends when its training loss has not fallen by
    `plateau_threshold` for `plateau_patience` rounds (`progress.Plateau`). docs/training.md explains them.
    """

    strategy: StrategyName
    dataset: str
    data_root: str | None = None
    rounds: int = Field(ge=1, le=10**6)
    clients: int = Field(ge=1, le=10**7)
    cohort_size: int = Field(ge=1)
    local_epochs: int = Field(default=1, ge=1, le=10**4)
    local_batch: int = Field(ge=2)
    learning_rate: float = Field(default=0.1, gt=0)
    final_learning_rate: float = Field(default=0.01, ge=0)
    augment: bool = True
    partition: str = "iid"
    minimum_samples: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    enforce: bool = False
    workers: int = Field(default=1, ge=1, le=1024)
    prefix_cache: str | None = None
    batched_clients: int = Field(default=1, ge=1, le=1024)
    device: Literal["cpu", "cuda"] = "cpu"
    evaluate_every: int = Field(default=1, ge=1)
    checkpoint_every: int = Field(default=1, ge=1)
    client_dropout: float = Field(default=0.0, ge=0, lt=1)
    stragglers: float = Field(default=0.0, ge=0, lt=1)
    max_change: float = Field(default=10.0, gt=1)
    rounds_policy: Literal["planned", "plateau"] = "planned"
    plateau_patience: int = Field(default=5, ge=1)
    plateau_threshold: float = Field(default=0.01, ge=0, lt=1)

    @field_validator("prefix_cache")
    @classmethod
    def _is_an_amount(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _rate_falls(self) -> "RunSettings":
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"the final learning rate {self.final_learning_rate:g} is above the first, {self.learning_rate:g}"
            )
        return self

    @model_validator(mode="after")
    def _stages_end_where_there_are_some(self) -> "RunSettings":
        if self.rounds_policy == "plateau" and self.strategy != "slt":
            raise ValueError(f"the rounds policy plateau is for stages; {self.strategy} has none")
        return self

    @model_validator(mode="after")
    def _faster_ways_do_not_go_together(self) -> "RunSettings":
        if self.prefix_cache and self.enforce:
            raise ValueError("a prefix cache is memory that a client under an enforced budget does not have; leave one")
        if self.batched_clients > 1 and self.enforce:
            raise ValueError("batched clients share their memory, and an enforced budget is of one; leave one out")
        if self.prefix_cache and self.workers > 1:
            raise ValueError("a prefix cache is of one process, and workers end with each round; leave one of them out")
        if self.batched_clients > 1 and (self.workers > 1 or self.prefix_cache):
            raise ValueError("batched clients go neither with workers nor with a prefix cache; leave one of them out")
        return self


class Refusal(Record):
    """A client whose update was not used or did not come, and why."""

    client: int
    reason: str


class RoundRow(Record):
    """One round, one line of metrics.jsonl.

    `accuracy` (0 to 1; the run's metric, where that is another) and `loss` are of the sub-model trained this round, on
    the test images; both are None in a round without evaluation, a loss also where it is not finite.

    Of the `clients` chosen, `dropped_out` never answered, `stragglers` answered too late, and the updates of `refused`
    were not used, for the reasons in `refusals`; where clients are real, `absent` says why those did not answer, or not
    in time. `bytes_down`, `bytes_up` and `train_flops` are of all clients, as
    docs/training.md counts them (`train_flops` None: an older version's run). `measured_peak_bytes` is a client's
    measured step at the local batch, allocator ruler, by tier. `seconds` = `train_seconds` + `evaluate_seconds` + the
    rest.
    """

    round: int = Field(ge=1)
    stage: int = Field(ge=0)
    config: Config
    learning_rate: float
    accuracy: float | None = Field(ge=0, le=1)
    loss: float | None
    train_loss: float | None
    bytes_up: int
    bytes_down: int
    train_flops: int | None = None
    clients: int
    dropped_out: int = 0
    stragglers: int = 0
    absent: tuple[Refusal, ...] = ()
    refused: int
    refusals: tuple[Refusal, ...] = ()
    measured_peak_bytes: dict[str, int]
    train_seconds: float
    evaluate_seconds: float | None = None
    seconds: float


class RunTier(Record):
    """A tier as it took part: its budget, its clients, and a client's highest measured peak over the run."""

    name: str
    budget_bytes: int
    clients: int
    takes_part: bool
    measured_peak_bytes: int | None = None


class RunResult(Record):
    """A run of one strategy with one seed, finished or stopped.

    `mean` and `std` are those that images were normalised by, a number a channel, pixels in 0..1; None in runs of older
    versions. `head_scale` is that of a run that holds one width from beginning to end.

    `accuracy_batch_statistics` and `accuracy_running_statistics` are of the final network on the test images, with
    norms as trained (statistics of batches of 256) and with running statistics recalibrated on the server's images;
    None when the run was stopped before its end.

    `confusion` counts the test images (of masks: the pixels) of each given class (rows) by the class that the final
    network, with batch statistics, took them for (columns); `images_per_class` counts each client's (rows) training
    images of each class. None where that is not known: `confusion` of stopped runs,
    `images_per_class` of masks, either where it has more than 100,000 numbers, and both in runs of older versions.
    """

    settings: RunSettings
    plan: Plan
    metric: Metric = "accuracy"
    dataset_title: str
    train_images: int
    test_images: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    head_scale: float | None = None
    tiers: tuple[RunTier, ...]
    rows: tuple[RoundRow, ...] = ()
    status: Literal["finished", "stopped"]
    accuracy_batch_statistics: float | None = None
    accuracy_running_statistics: float | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
    images_per_class: tuple[tuple[int, ...], ...] | None = None
    environment: dict[str, str]

    @property
    def title(self) -> str:
        """The run's name where several are shown."""
        return f"{self.settings.strategy}-seed{self.settings.seed}"

    @property
    def bytes_up(self) -> int:
        """Bytes uploaded by all clients in all rounds."""
        return sum(row.bytes_up for row in self.rows)

    def frame(self) -> "pd.DataFrame":
        """The rounds as a table: a row a round, a column a field of `RoundRow` (``config.head_scale`` and so on)."""
        import pandas as pd

        return pd.json_normalize([row.model_dump() for row in self.rows])

    @property
    def mean_last_accuracy(self) -> float | None:
        """Mean test accuracy of the last five rounds that were evaluated, the figure that runs are compared by."""
        last = [row.accuracy for row in self.rows if row.accuracy is not None][-5:]
        return sum(last) / len(last) if last else None
