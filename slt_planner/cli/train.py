"""`slt-train`: a plan goes in, federated runs, their folders and their report come out; or begun runs are continued."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args

import typer
from rich.console import Console

from slt_planner.cli.common import chosen, command_line, consoles, validated
from slt_planner.cli.live import LiveRounds
from slt_planner.errors import InputError, SltError
from slt_planner.federated.engines.flower.options import FlowerOptions, need_flower
from slt_planner.federated.result import RoundRow, RunResult, RunSettings, StrategyName
from slt_planner.federated.run_folder import METRICS, PICTURE, REPORT, SETTINGS, clear_runs, load_run, run_folders
from slt_planner.files import check_writable, refuse_existing
from slt_planner.planning.plan import Plan, load_plan
from slt_planner.reporting.report import report as write_report
from slt_planner.reporting.run_groups import sitting_out_words
from slt_planner.reporting.terminal import run_table

if TYPE_CHECKING:
    from slt_planner.data.datasets import Dataset
    from slt_planner.federated.setup import Run

GoOn: TypeAlias = "Callable[[Run, Path, Callable[[RoundRow], None]], RunResult]"

_STRATEGIES = get_args(StrategyName)
_GO_WITH_RESUME = {"resume", "model", "json_output", "engine", "deadline", "minimum_answers"}


def train(
    context: typer.Context,
    plan: Annotated[Path | None, typer.Option(help="The plan to run, made by slt-plan.")] = None,
    dataset: Annotated[
        str,
        typer.Option(
            help="digits (embedded), cifar10, cifar100, fashion-mnist, emnist, svhn, or a folder: parquet:DIR, "
            "imagefolder:DIR, masks:DIR, femnist:DIR, tiny-imagenet:DIR, imagenet64:DIR."
        ),
    ] = "digits",
    data_root: Annotated[
        Path | None, typer.Option(help="Where data sets are that have a name alone [the user's data folder].")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch such a data set if it is not there.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Your own network, as given to slt-plan: package.module:factory or ./file.py:Class."),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="One of these, or several with commas: " + ", ".join(_STRATEGIES) + ".")
    ] = "slt",
    rounds: Annotated[int | None, typer.Option(min=1, help="Federated rounds [100; small data: 30].")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Clients in all [100; small data: 10].")] = None,
    cohort_size: Annotated[int | None, typer.Option(min=1, help="Clients a round [10].")] = None,
    local_epochs: Annotated[int, typer.Option(min=1, help="Epochs a client trains in a round.")] = 1,
    local_batch: Annotated[
        int | None, typer.Option(min=2, help="Images in a client's step [the plan's; small data: fewer].")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="In the first round.")] = 0.1,
    final_learning_rate: Annotated[
        float | None, typer.Option(help="In the last round; cosine between [a tenth of the first].")
    ] = None,
    partition: Annotated[
        str, typer.Option(help="How images are split over clients: iid, dirichlet:ALPHA, shards:N or natural.")
    ] = "iid",
    minimum_samples: Annotated[int, typer.Option(min=1, help="Training images that every client has at least.")] = 2,
    no_augmentation: Annotated[
        bool,
        typer.Option("--no-augmentation", help="Do not crop and flip images at random, even where that makes sense."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of initial weights, split, cohorts and batches.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Make each run with so many seeds, from --seed on.")] = 1,
    rounds_policy: Annotated[
        str, typer.Option(help="planned, or plateau: slt goes on sooner where the loss stops falling.")
    ] = "planned",
    plateau_patience: Annotated[int, typer.Option(help="Rounds without a lower loss that end a stage.")] = 5,
    plateau_threshold: Annotated[float, typer.Option(help="By how much of itself a loss must fall to count.")] = 0.01,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Rounds from one evaluation to the next.")] = 1,
    client_dropout: Annotated[float, typer.Option(help="Chance that a chosen client never answers.")] = 0.0,
    stragglers: Annotated[float, typer.Option(help="Chance that a chosen client answers too late.")] = 0.0,
    max_change: Annotated[
        float, typer.Option(help="An update that moves the weights so many times as far as usual is refused.")
    ] = 10.0,
    out: Annotated[Path | None, typer.Option(help="The run folder [runs/DATE-TIME].")] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Rounds from one checkpoint to the next.")] = 1,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a run, or with a folder of runs; takes no other settings.")
    ] = None,
    enforce: Annotated[
        bool, typer.Option("--enforce", help="Run clients under their tier's budget: a step that would pass it fails.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Clients that train at once, each in a process of its own on one thread.")
    ] = 1,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            help="Memory, such as 1GB, for what frozen layers give for clients' images, computed once a stage; wants "
            "images that are not augmented (see --no-augmentation) and a plan with norms running [none]."
        ),
    ] = None,
    batched_clients: Annotated[
        int, typer.Option(min=1, help="Clients whose weights are stacked and trained at once, where they train alike.")
    ] = 1,
    device: Annotated[str, typer.Option(help="Where clients train and images are evaluated: cpu or cuda.")] = "cpu",
    engine: Annotated[
        str,
        typer.Option(help="Where clients train: local, or flower (Flower's simulation; wants slt-planner[flower])."),
    ] = "local",
    deadline: Annotated[float, typer.Option(help="flower: seconds until a client is late.")] = 600.0,
    minimum_answers: Annotated[
        int, typer.Option(min=1, help="flower: a round with fewer updates uses none of them.")
    ] = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite an existing run folder, with all runs in it.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Run a plan, and what it competes with, in a simulated federation.

    Several strategies or seeds go into subfolders of the run folder. Ctrl-C ends a run early and leaves a readable
    folder, from which --resume goes on; so it does after a crash.
    """
    console, progress_console = consoles(json_output)
    local = {
        "--workers": workers > 1,
        "--prefix-cache": prefix_cache is not None,
        "--batched-clients": batched_clients > 1,
        "--device": device != "cpu",
    }
    _refuse_without(context, "--engine flower", engine == "flower", ["deadline", "minimum_answers"])
    plateau = rounds_policy == "plateau" or resume is not None
    _refuse_without(context, "--rounds-policy plateau", plateau, ["plateau_patience", "plateau_threshold"])
    go_on = _engine(engine, [option for option, given in local.items() if given], model, deadline, minimum_answers)
    if resume is not None:
        _refuse_settings(context, resume)
        out, results = resume, _continue_all(_begun_runs(resume, model, progress_console), progress_console, go_on)
    else:
        if plan is None:
            raise InputError("--plan is needed, a plan made by slt-plan; or --resume, a run to go on with")
        loaded = load_plan(plan)
        strategies = _strategies(strategy)
        out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        if not force:
            refuse_existing([out])
        given = {"rounds": rounds, "clients": clients, "cohort_size": cohort_size, "local_batch": local_batch}
        fixed = {
            "dataset": dataset,
            "local_epochs": local_epochs,
            "learning_rate": learning_rate,
            "final_learning_rate": learning_rate / 10 if final_learning_rate is None else final_learning_rate,
            "data_root": None if data_root is None else str(data_root),
            "partition": partition,
            "minimum_samples": minimum_samples,
            "augment": not no_augmentation,
            "evaluate_every": evaluate_every,
            "checkpoint_every": checkpoint_every,
            "client_dropout": client_dropout,
            "stragglers": stragglers,
            "max_change": max_change,
            "enforce": enforce,
            "workers": workers,
            "prefix_cache": prefix_cache,
            "batched_clients": batched_clients,
            "device": chosen(device, "--device", ("cpu", "cuda")),
        }
        if chosen(rounds_policy, "--rounds-policy", ("planned", "plateau")) == "plateau" and "slt" not in strategies:
            raise InputError(f"--rounds-policy plateau is for stages; {', '.join(strategies)} has none")
        of_stages = {
            "rounds_policy": rounds_policy,
            "plateau_patience": plateau_patience,
            "plateau_threshold": plateau_threshold,
        }
        check_writable([out / METRICS])
        wanted = [(name, number) for name in strategies for number in range(seed, seed + seeds)]
        runs = _new_runs(loaded, model, wanted, given, fixed, of_stages, download, progress_console)
        results = _continue_all(_begin_all(runs, out, force, progress_console), progress_console, go_on)
    write_report(results, out / REPORT, force=True, command=command_line(), picture=out / PICTURE)
    if json_output:
        print("[" + ",\n".join(result.model_dump_json(indent=2) for result in results) + "]")
    console.print(run_table(results))
    line = f"Written: {out}/ (metrics, weights, TensorBoard log, {REPORT}, {PICTURE})"
    console.print(line, soft_wrap=True, markup=False, highlight=False)
    if results[-1].status == "stopped":
        done, wanted_rounds = len(results[-1].rows), results[-1].settings.rounds
        raise SltError(f"stopped after round {done} of {wanted_rounds}; go on with slt-train --resume {out}")


def _engine(engine: str, local: Sequence[str], model: str | None, deadline: float, minimum_answers: int) -> GoOn:
    """What continues a run in its folder, on an engine; `local` are the options given that are of the local one."""
    if chosen(engine, "--engine", ("local", "flower")) == "local":
        return _locally
    if local:
        raise InputError(f"{local[0]} is of the local engine; with --engine flower, Ray runs clients in its processes")
    need_flower()
    options = validated(FlowerOptions, deadline_s=deadline, minimum_answers=minimum_answers)
    return partial(_on_flower, options=options, model=model)


def _locally(run: "Run", folder: Path, progress: "Callable[[RoundRow], None]") -> RunResult:
    from slt_planner.federated.experiment import continue_run

    return continue_run(run, folder, progress)


def _on_flower(
    run: "Run", folder: Path, progress: "Callable[[RoundRow], None]", options: FlowerOptions, model: str | None
) -> RunResult:
    if run.settings.device != "cpu":
        raise InputError(f"{folder}: trains on {run.settings.device}, and Flower's clients here on cpu")
    from slt_planner.federated.engines.flower.simulation import simulate

    return simulate(run, folder, progress, options, model)


def _strategies(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _STRATEGIES:
            raise InputError(f"unknown strategy {name!r}; known are {', '.join(_STRATEGIES)}")
    if len(set(names)) < len(names):
        raise InputError(f"strategies {text!r}: one is given twice")
    return names


def _refuse_settings(context: typer.Context, resume: Path) -> None:
    """A run goes on as it was begun."""
    for name, option in _given(context).items():
        if name not in _GO_WITH_RESUME:
            raise InputError(f"{option} does not go with --resume: {resume} goes on as it was begun, see {SETTINGS}")


def _refuse_without(context: typer.Context, needed: str, there: bool, names: Sequence[str]) -> None:
    """Options that say something only beside another one."""
    for name, option in _given(context).items():
        if name in names and not there:
            raise InputError(f"{option} says nothing without {needed}; give both, or neither")


def _given(context: typer.Context) -> dict[str, str]:
    """What was given on the command line, by parameter."""
    sources = {parameter: context.get_parameter_source(parameter.name or "") for parameter in context.command.params}
    given = (parameter for parameter, source in sources.items() if source is not None and source.name != "DEFAULT")
    return {parameter.name or "": parameter.opts[0] for parameter in given}


def _new_runs(
    plan: Plan,
    model: str | None,
    wanted: Sequence[tuple[str, int]],
    given: dict[str, int | None],
    fixed: dict[str, Any],
    of_stages: dict[str, Any],
    download: bool,
    console: Console,
) -> "list[Run]":
    """All are prepared before the first one runs: what is wrong with the last must not cost the hours of the others."""
    from slt_planner.federated.setup import default_settings, load_data, load_network, prepare

    fewest: dict[str, Any] = {"rounds": 1, "clients": 1, "cohort_size": 1, "local_batch": 2}

    def settings_of(strategy: str, seed: int, sizes: dict[str, int]) -> RunSettings:
        own = of_stages if strategy == "slt" else {}
        return validated(RunSettings, strategy=strategy, seed=seed, **sizes, **fixed, **own)

    for strategy, seed in wanted:
        settings_of(strategy, seed, fewest)
    network = load_network(plan, wanted[0][1], model)
    data = load_data(plan, fixed["dataset"], fixed["data_root"], download)
    scheme, minimum = fixed["partition"], fixed["minimum_samples"]
    defaults = default_settings(plan, data, given["clients"], scheme, minimum, wanted[0][1]).model_dump()
    images = defaults.pop("images_a_client")
    sizes = defaults | {name: value for name, value in given.items() if value is not None}
    line = _words(data, images, sizes, given["local_batch"], plan)
    console.print(line, soft_wrap=True, markup=False, highlight=False)
    networks = {seed: load_network(plan, seed, model) if seed != wanted[0][1] else network for _, seed in wanted}
    runs = []
    with console.status("") as status:
        for number, (name, seed) in enumerate(wanted, start=1):
            status.update(f"measuring what clients of {name} train ({number} of {len(wanted)} runs)")
            runs.append(prepare(plan, settings_of(name, seed, sizes), data, networks[seed]))
    return runs


def _begin_all(runs: "Sequence[Run]", out: Path, force: bool, console: Console) -> "list[tuple[Path, Run]]":
    """Each with its folder, which is there from now on; so all can be resumed, whatever happens to the first."""
    from slt_planner.federated.experiment import begin_run

    if force:
        clear_runs(out)
    begun = []
    for run in runs:
        folder = out if len(runs) == 1 else out / f"{run.settings.strategy}-seed{run.settings.seed}"
        if words := sitting_out_words(begin_run(run, folder, force)):
            console.print(f"{run.settings.strategy}: {words}", soft_wrap=True, markup=False, highlight=False)
        begun.append((folder, run))
    return begun


def _begun_runs(path: Path, model: str | None, console: Console) -> "list[tuple[Path, Run | RunResult]]":
    """The runs of a folder: as they ended, or prepared to go on; all before the first one goes on."""
    from slt_planner.federated.experiment import prepare_again

    results = [(folder, load_run(folder)) for folder in run_folders(path)]
    begun: list[tuple[Path, Run | RunResult]] = []
    data: dict[tuple[object, ...], Dataset] = {}
    for folder, result in results:
        if result.status == "finished":
            line = f"{folder}: finished after {len(result.rows)} rounds, nothing is left to do"
            begun.append((folder, result))
        else:
            settings = result.settings
            line = f"{folder}: goes on, {len(result.rows)} of {settings.rounds} rounds were done"
            which = (settings.dataset, settings.data_root, result.plan.input_shape, result.plan.num_classes)
            run = prepare_again(result, model, data.get(which))
            data[which] = run.dataset
            begun.append((folder, run))
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return begun


def _continue_all(begun: "Sequence[tuple[Path, Run | RunResult]]", console: Console, go_on: GoOn) -> list[RunResult]:
    results: list[RunResult] = []
    for folder, run in begun:
        if isinstance(run, RunResult):
            results.append(run)
            continue
        title = run.settings.strategy if len({r.settings.seed for _, r in begun}) == 1 else folder.name
        with LiveRounds(title, run.settings.rounds, run.graph.adapter.metric, console) as live:
            results.append(go_on(run, folder, live.show))
        if results[-1].status == "stopped":
            break
    return results


def _words(data: "Dataset", images: int, sizes: dict[str, int], asked_batch: int | None, plan: Plan) -> str:
    """What is trained on, and a word about the local batch where it is not the plan's."""
    line = f"{data.title}: {len(data.train_labels):,} images, about {images} for each of {sizes['clients']} clients"
    if asked_batch is None and sizes["local_batch"] < plan.batch_size:
        line += (
            f"; local batch {sizes['local_batch']}, not the plan's {plan.batch_size}, "
            f"so that a client can fill several: its steps need less memory than planned, and so may those of larger "
            f"networks; --local-batch {plan.batch_size} compares methods at the planned one"
        )
    return line
