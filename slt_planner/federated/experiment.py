"""A plan goes in, a federated run comes out: the loop over rounds, and the folder it leaves."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from slt_planner.config import Config, Norms
from slt_planner.data.datasets import Dataset
from slt_planner.environment import environment
from slt_planner.errors import InputError, first_invalid
from slt_planner.federated.checkpoint import load_checkpoint, save_checkpoint
from slt_planner.federated.engines.base import Engine
from slt_planner.federated.engines.batched import BatchedEngine
from slt_planner.federated.engines.cached import CachingEngine
from slt_planner.federated.engines.local import LocalEngine
from slt_planner.federated.engines.workers import WorkerEngine
from slt_planner.federated.evaluate import confusion_and_loss, quality, recalibrate
from slt_planner.federated.result import RoundRow, RunResult, RunSettings, RunTier
from slt_planner.federated.rounds import EVALUATION_STREAM, run_round
from slt_planner.federated.run_folder import SPLIT, TENSORBOARD, RunFolder, load_run
from slt_planner.federated.setup import Run, default_settings, load_data, load_network, prepare
from slt_planner.federated.strategies.base import ServerState
from slt_planner.federated.tensorboard_log import TensorboardLog
from slt_planner.memory.step import threads
from slt_planner.planning.plan import Plan
from slt_planner.submodel.extract import extract
from slt_planner.units import parse_bytes

_MOST_COUNTS = 100_000
_DIFFERS = {
    "settings": "it has other settings",
    "plan": "it has another plan",
    "metric": "its network is judged by something else",
    "dataset_title": "its data set is another one",
    "train_images": "its data set has changed",
    "test_images": "its data set has changed",
    "mean": "its data set has changed",
    "std": "its data set has changed",
    "head_scale": "another width fits its budget on this machine",
}
"""What makes a run another one than its folder was begun with, by what is compared."""


def run_experiment(
    run: Run,
    folder: Path,
    force: bool = False,
    progress: Callable[[RoundRow], None] = lambda row: None,
) -> RunResult:
    """Do the rounds of a run and leave a run folder; an interrupt (Ctrl-C) ends it early, folder and all.

    Args:
        run: the run, prepared.
        folder: the run folder to make.
        force: overwrite the files of an existing run.
        progress: called after each round.

    Raises:
        InputError: the folder exists and `force` is False, or it cannot be written.
    """
    begin_run(run, folder, force)
    return continue_run(run, folder, progress)


def begin_run(run: Run, folder: Path, force: bool = False) -> RunResult:
    """Make the folder of a run, from which `continue_run` can go on, and give what it holds; as `run_experiment`."""
    with threads(run.plan.step) as number:
        begun = _empty_result(run, environment(number))
    RunFolder(folder).begin(begun, force)
    return begun


def continue_run(
    run: Run,
    folder: Path,
    progress: Callable[[RoundRow], None] = lambda row: None,
    engine: Engine | None = None,
) -> RunResult:
    """Do the rounds of a run that its folder does not have yet, and come to the end it would have come to at once.

    The run goes on from its checkpoint, or from its first round if it has none; rows of rounds past that are dropped
    and made again. An interrupt (Ctrl-C) ends it early; it can be continued then. Clients train where the engine runs
    them, by default in this process or the run's workers; whichever it is, the run is the same.

    Raises:
        InputError: the run is not the one that the folder was begun with, the checkpoint and the rows do not go
            together, another process is at work on the run, or its folder cannot be written.
    """
    run_folder = RunFolder(folder)
    with threads(run.plan.step), run_folder.alone():
        result = load_run(folder)
        _check_same(run, result, folder)
        state = load_checkpoint(folder, run.graph, run.start) or run.start
        rows, outcome, weights = run_folder.keep_rounds(state.round), dict[str, object](), None
        if not (folder / SPLIT).exists():
            run.images_of.save(folder / SPLIT)
        engine = engine or _engine(run.settings)
        with closing(TensorboardLog(folder / TENSORBOARD, rows)) as log:
            try:
                while state.round < run.settings.rounds:
                    after, row = run_round(run, state, engine)
                    run_folder.append(row)
                    rows.append(row)
                    state = after
                    if state.round % run.settings.checkpoint_every == 0:
                        save_checkpoint(folder, run.graph, state)
                    log.add(row)
                    progress(row)
                weights = _recalibrated(run, state, rows)
                outcome = judge(run, weights, _last_config(run, rows))
            except KeyboardInterrupt:  # what is done is kept, and the result says "stopped"
                save_checkpoint(folder, run.graph, state)
        result = _with_rows(result, rows).model_copy(update=outcome)
        run_folder.write_weights(weights or _recalibrated(run, state, rows), _last_config(run, rows))
        run_folder.write_settings(result)  # after the weights: what is finished has them
        if result.status == "finished":
            run_folder.remove_checkpoint()
    return result


def _engine(settings: RunSettings) -> Engine:
    """Where the clients of a run train on this machine."""
    if settings.workers > 1:
        return WorkerEngine(settings.workers)
    if settings.batched_clients > 1:
        return BatchedEngine(settings.batched_clients)
    return LocalEngine() if settings.prefix_cache is None else CachingEngine(parse_bytes(settings.prefix_cache))


def resume(folder: str | Path, model: nn.Module | str | None = None) -> RunResult:
    """Go on with a run that was interrupted, killed or never begun, to the end that it would have come to at once.

    Args:
        folder: the run folder.
        model: the network, where the plan's is not one of a library; it must be the one that the run was begun with.

    Raises:
        ValueError: not a run folder, or a network, data or files that are not the run's.
        InfeasibleError: as `train`.
    """
    result = load_run(folder)
    return result if result.status == "finished" else continue_run(prepare_again(result, model), Path(folder))


def prepare_again(result: RunResult, model: nn.Module | str | None = None, dataset: Dataset | None = None) -> Run:
    """The run that a run folder was begun with, prepared as it was then; `dataset` where it is loaded already.

    Raises:
        InputError: the network is not the plan's, or the data are not there any more.
        InfeasibleError: as `prepare`.
    """
    plan, settings = result.plan, result.settings
    network = load_network(plan, settings.seed, model)
    data = dataset or load_data(plan, settings.dataset, settings.data_root)
    return prepare(plan, settings, data, network)


def train(
    plan: Plan,
    dataset: str = "digits",
    rounds: int | None = None,
    model: nn.Module | str | None = None,
    strategy: str = "slt",
    out: str | Path = "runs/run",
    force: bool = False,
    download: bool = False,
    **settings: Any,
) -> RunResult:
    """Run a plan and leave a run folder; the arguments are those of ``slt-train``.

    Args:
        plan: the plan.
        dataset: as `load_dataset` takes it (docs/data.md).
        rounds: federated rounds; by default by the data set's size.
        model: the network to start from, or its name as `load_model` takes it; by default the plan's, initialised by
            the seed.
        strategy: one of `StrategyName`.
        out: the run folder.
        force: overwrite the files of an existing run.
        download: fetch a data set that has a name alone, where it is not there.
        settings: more fields of `RunSettings`, such as ``clients=100``.

    Raises:
        ValueError: settings, data or model that are wrong or do not go together, or a folder that exists.
        InfeasibleError: nothing that the strategy trains fits, or a step needs more than its tier's budget here.
    """
    seed = settings.get("seed", 0)
    network = load_network(plan, seed if isinstance(seed, int) else 0, model)
    data = load_data(plan, dataset, settings.get("data_root"), download)
    clients, scheme = settings.get("clients"), settings.get("partition", "iid")
    minimum = settings.get("minimum_samples", 2)
    defaults = default_settings(plan, data, clients, scheme, minimum).model_dump(exclude={"images_a_client"})
    given = {"rounds": rounds, **settings}
    if isinstance(rate := settings.get("learning_rate"), (int, float)):
        defaults["final_learning_rate"] = rate / 10
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    try:
        run_settings = RunSettings.model_validate({"strategy": strategy, "dataset": dataset, **chosen})
    except ValidationError as error:
        raise InputError(first_invalid(error)) from error
    return run_experiment(prepare(plan, run_settings, data, network), Path(out), force)


def judge(run: Run, weights: Mapping[str, Tensor], config: Config) -> dict[str, object]:
    """The accuracy of what was trained last, by both kinds of statistics, as fields of a finished result.

    `weights` are recalibrated.
    """
    seed = run.settings.seed
    kinds: tuple[tuple[Norms, str], ...] = (
        ("static", "accuracy_batch_statistics"),
        ("running", "accuracy_running_statistics"),
    )
    outcome: dict[str, object] = {"status": "finished"}
    for norms, name in kinds:
        model = extract(run.graph, weights, config, norms).to(run.settings.device)
        counts, _ = confusion_and_loss(model, run.dataset, seed + EVALUATION_STREAM)
        outcome[name] = quality(counts, run.graph.adapter.metric)
        if norms == "static" and counts.numel() <= _MOST_COUNTS:
            outcome["confusion"] = tuple(map(tuple, counts.tolist()))
    return outcome


def _recalibrated(run: Run, state: ServerState, rows: Sequence[RoundRow]) -> dict[str, Tensor]:
    """The weights with running statistics of what was trained last."""
    return recalibrate(run.graph, state.weights, _last_config(run, rows), run.dataset, run.settings.seed)


def _last_config(run: Run, rows: Sequence[RoundRow]) -> Config:
    """What the last round was judged by; before the first one, what that will be."""
    return rows[-1].config if rows else run.strategy.evaluation_config(run.start)


def _check_same(run: Run, begun: RunResult, folder: Path) -> None:
    """Whether a run is the one that a folder was begun with; its measured peaks are those of this machine."""
    own = _empty_result(run, begun.environment)
    for name in _DIFFERS:
        now, then = getattr(own, name), getattr(begun, name)
        if now != then and (then is not None or name == "head_scale"):  # older versions kept no mean and std
            told = f" ({name.replace('_', ' ')}: {then} then, {now} now)" if isinstance(then, (str, int, float)) else ""
            raise InputError(f"run {folder}: is not the one that was begun here: {_DIFFERS[name]}{told}")


def _empty_result(run: Run, made_on: dict[str, str]) -> RunResult:
    configs = {step.config for tier in run.plan.tiers for step in run.strategy.tier_steps(tier.name)}
    tiers = tuple(
        RunTier(
            name=tier.name,
            budget_bytes=tier.budget_bytes,
            clients=run.tier_of.count(number),
            takes_part=bool(run.strategy.tier_steps(tier.name)),
        )
        for number, tier in enumerate(run.plan.tiers)
    )
    return RunResult(
        settings=run.settings,
        plan=run.plan,
        dataset_title=run.dataset.title,
        metric=run.graph.adapter.metric,
        train_images=len(run.dataset.train_labels),
        test_images=len(run.dataset.test_labels),
        mean=run.dataset.mean,
        std=run.dataset.std,
        head_scale=configs.pop().head_scale if len(configs) == 1 else None,
        tiers=tiers,
        status="stopped",
        images_per_class=_images_per_class(run),
        environment=made_on,
    )


def _images_per_class(run: Run) -> tuple[tuple[int, ...], ...] | None:
    labels, classes = run.dataset.train_labels, run.dataset.num_classes
    if labels.ndim > 1 or len(run.images_of) * classes > _MOST_COUNTS:  # of pixels, or too many to be looked at
        return None
    clients = range(len(run.images_of))
    return tuple(tuple(labels[run.images_of[client]].bincount(minlength=classes).tolist()) for client in clients)


def _with_rows(result: RunResult, rows: Sequence[RoundRow]) -> RunResult:
    def highest(tier: RunTier) -> RunTier:
        peaks = [row.measured_peak_bytes[tier.name] for row in rows if tier.name in row.measured_peak_bytes]
        return tier.model_copy(update={"measured_peak_bytes": max(peaks, default=None)})

    return result.model_copy(update={"rows": tuple(rows), "tiers": tuple(highest(tier) for tier in result.tiers)})
