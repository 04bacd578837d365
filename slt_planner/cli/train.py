"""`slt-train`: a plan goes in, a federated run, its folder and its report come out."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slt_planner.cli.common import command_line, consoles, validated
from slt_planner.config import Metric
from slt_planner.errors import InputError, SltError
from slt_planner.federated.result import RoundRow, RunResult, RunSettings, StrategyName
from slt_planner.federated.run_folder import METRICS, PICTURE, REPORT, clear_runs
from slt_planner.files import check_writable, refuse_existing
from slt_planner.planning.plan import Plan, load_plan
from slt_planner.reporting.report import report as write_report
from slt_planner.reporting.terminal import run_table

if TYPE_CHECKING:
    from slt_planner.data.datasets import Dataset

_STRATEGIES = get_args(StrategyName)


def train(
    plan: Annotated[Path, typer.Option(help="The plan to run, made by slt-plan.")],
    dataset: Annotated[str, typer.Option(help="digits (embedded, 8x8 images), parquet:DIR or masks:DIR.")] = "digits",
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
    final_learning_rate: Annotated[float, typer.Option(help="In the last round; cosine between.")] = 0.01,
    partition: Annotated[str, typer.Option(help="How images are split over clients: iid or dirichlet:ALPHA.")] = "iid",
    seed: Annotated[int, typer.Option(help="Of initial weights, split, cohorts and batches.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The run folder [runs/DATE-TIME].")] = None,
    enforce: Annotated[
        bool, typer.Option("--enforce", help="Run clients under their tier's budget: a step that would pass it fails.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing run folder.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Run a plan, and what it competes with, in a simulated federation.

    Several strategies go into subfolders of the run folder. Ctrl-C ends a run early and leaves a readable folder.
    """
    console, progress_console = consoles(json_output)
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
        "final_learning_rate": final_learning_rate,
        "partition": partition,
        "seed": seed,
        "enforce": enforce,
    }
    check_writable([out / METRICS])
    results = _run_all(loaded, model, strategies, given, fixed, out, force, progress_console)
    write_report(results, out / REPORT, force=True, command=command_line(), picture=out / PICTURE)
    if json_output:
        print("[" + ",\n".join(result.model_dump_json(indent=2) for result in results) + "]")
    console.print(run_table(results))
    line = f"Written: {out}/ (metrics, weights, {REPORT}, {PICTURE})"
    console.print(line, soft_wrap=True, markup=False, highlight=False)
    if results[-1].status == "stopped":
        done, wanted = len(results[-1].rows), results[-1].settings.rounds
        raise SltError(f"stopped after round {done} of {wanted}; what is done is in {out}")


def _strategies(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _STRATEGIES:
            raise InputError(f"unknown strategy {name!r}; known are {', '.join(_STRATEGIES)}")
    if len(set(names)) < len(names):
        raise InputError(f"strategies {text!r}: one is given twice")
    return names


def _run_all(
    plan: Plan,
    model: str | None,
    strategies: list[str],
    given: dict[str, int | None],
    fixed: dict[str, object],
    out: Path,
    force: bool,
    console: Console,
) -> list[RunResult]:
    from slt_planner.data.datasets import load_dataset
    from slt_planner.federated.experiment import run_experiment
    from slt_planner.federated.setup import default_settings, image_shape, load_network, prepare

    seed = validated(RunSettings, strategy="slt", rounds=1, clients=1, cohort_size=1, local_batch=2, **fixed).seed
    network = load_network(plan, seed, model)
    data = load_dataset(str(fixed["dataset"]), image_shape(plan), plan.num_classes)
    defaults = default_settings(plan, data, given["clients"]).model_dump()
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    line = _words(data, chosen, given["local_batch"], plan)
    console.print(line, soft_wrap=True, markup=False, highlight=False)
    # All are prepared before the first one runs: what is wrong with the last must not cost the hours of the others.
    all_settings = [validated(RunSettings, strategy=name, **chosen, **fixed) for name in strategies]
    runs = [prepare(plan, settings, data, network) for settings in all_settings]
    if force:
        clear_runs(out)
    results: list[RunResult] = []
    for run in runs:
        name = run.settings.strategy
        folder = out if len(runs) == 1 else out / f"{name}-seed{seed}"
        with _Live(name, run.settings.rounds, run.graph.adapter.metric, console) as live:
            results.append(run_experiment(run, folder, force=force, progress=live.show))
        if results[-1].status == "stopped":
            break
    return results


def _words(data: "Dataset", chosen: dict[str, int], asked_batch: int | None, plan: Plan) -> str:
    """What is trained on, and a word about the local batch where it is not the plan's."""
    images = len(data.train_labels) // chosen["clients"]
    line = f"{data.title}: {len(data.train_labels):,} images, about {images} for each of {chosen['clients']} clients"
    if asked_batch is None and chosen["local_batch"] < plan.batch_size:
        line += (
            f"; local batch {chosen['local_batch']}, not the plan's {plan.batch_size}, "
            "so that a client can fill several (it needs less memory than planned)"
        )
    return line


class _Live:
    """Rounds as they come: a bar on a terminal, a plain line each otherwise."""

    def __init__(self, strategy: str, rounds: int, metric: Metric, console: Console) -> None:
        self._strategy, self._rounds, self._console = strategy, rounds, console
        self._metric = metric.replace("_", " ")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(strategy, total=rounds)

    def __enter__(self) -> "_Live":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, row: RoundRow) -> None:
        """Show a finished round."""
        line = (
            f"{self._strategy} round {row.round}/{self._rounds}  stage {row.stage}  {row.config}  "
            f"{self._metric} {row.accuracy:.1%}  loss {_short(row.loss)}  {row.seconds:.1f} s"
        )
        self._bar.update(self._task, advance=1, description=f"{self._strategy} {row.config} {row.accuracy:.1%}")
        if not self._console.is_terminal:
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _short(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
