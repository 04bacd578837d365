"""`slt-plan`: a model and budgets go in, plan.json and a report come out."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from slt_planner.cli.common import chosen, command_line, consoles, numbers, traced_network, validated
from slt_planner.config import Granularity, StepSpec, Tier, equal_tiers
from slt_planner.errors import InfeasibleError, InputError
from slt_planner.files import check_writable, refuse_existing
from slt_planner.planning.levers import WhatIf
from slt_planner.planning.plan import Plan, Policy, RoundsPolicy
from slt_planner.planning.tiers import load_tiers
from slt_planner.reporting.html import report_paths
from slt_planner.reporting.report import report as write_report
from slt_planner.reporting.terminal import plan_table
from slt_planner.reporting.what_if_view import what_if_table
from slt_planner.reporting.words import count, shorten

if TYPE_CHECKING:
    from slt_planner.graph.trace import ModelGraph


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="resnet20, densenet40, vgg9, convnet, vit_cifar ...; a torchvision network such as resnet50; "
            "timm:NAME; or your own: package.module:factory or ./file.py:Class."
        ),
    ],
    budgets: Annotated[
        str | None, typer.Option(help="Memory budgets, one a device tier: 64,128,256MB (or MiB, GB).")
    ] = None,
    tiers: Annotated[
        Path | None,
        typer.Option(help="Instead of budgets, a TOML file of device tiers, such as profiles/devices.toml."),
    ] = None,
    select: Annotated[str | None, typer.Option(help="Which tiers of the file, by name: phone-a,gateway.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in one training step.")] = 128,
    optimizer: Annotated[str, typer.Option(help="sgd (momentum 0.9), adam or adamw.")] = "sgd",
    weight_decay: Annotated[float, typer.Option(help="Weight decay; it moves the peak.")] = 1e-3,
    norms: Annotated[
        str,
        typer.Option(help="Batch norms: static (batch statistics always) or running."),
    ] = "static",
    memory_format: Annotated[str, typer.Option(help="contiguous or channels_last.")] = "contiguous",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or autocast (fp32 with a bf16 forward pass).")] = "fp32",
    threads: Annotated[int | None, typer.Option(help="CPU threads; scratch memory depends on them.")] = None,
    device: Annotated[str, typer.Option(help="Where steps are measured: cpu or cuda.")] = "cpu",
    policy: Annotated[
        str,
        typer.Option(help="coupled: all tiers share a stage's head scale; per-tier: each has the widest that fits it."),
    ] = "coupled",
    rounds_policy: Annotated[
        str, typer.Option(help="A stage's rounds: in proportion to its trainable parameters, or equal.")
    ] = "parameters",
    levers: Annotated[
        str,
        typer.Option(
            help="How steps may run in less memory: none, auto (a stage uses exact levers where they buy something), "
            "exact (all exact ones, always), or a list such as lean_norms,recompute,micro_batches:8."
        ),
    ] = "none",
    verify: Annotated[
        bool,
        typer.Option(
            " /--no-verify", help="Rest on predictions: quick, and for networks that this machine cannot train."
        ),
    ] = True,
    trade_off: Annotated[
        bool, typer.Option(" /--no-trade-off", help="Leave out the map of what freezing and narrowing buy.")
    ] = True,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Also measure what cheaper levers would do: can a tier train it whole?")
    ] = False,
    granularity: Annotated[
        str, typer.Option(help="What a stage moves on by: a layer, or a block (up to where one tensor leads on).")
    ] = "layer",
    input_shape: Annotated[str | None, typer.Option(help="Of one sample, such as 3,64,64.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, max=10**6, help="Outputs of the network.")] = None,
    out: Annotated[Path, typer.Option(help="Where the plan is written.")] = Path("plan.json"),
    report: Annotated[Path | None, typer.Option(help="Where the HTML report (and its PNG) is written.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the plan as JSON on stdout.")] = False,
) -> None:
    """Find the largest schedule that fits each budget; real training steps, measured, are the proof.

    Prints a table and writes plan.json and a report (HTML and PNG).
    """
    report = report or Path("reports") / f"{out.stem}.html"
    targets = (out, *report_paths(report))
    if len(set(targets)) < len(targets):
        raise InputError(f"--out {out} is also a file of the report; give them different names")
    if not force:
        refuse_existing(targets)
    check_writable(targets)
    console, progress_console = consoles(json_output)
    own_tiers = _tiers(budgets, tiers, select)
    spec = validated(
        StepSpec,
        batch_size=batch_size,
        optimizer={"name": optimizer, "weight_decay": weight_decay},
        norms=norms,
        memory_format=memory_format,
        precision=precision,
        threads=threads,
        device=device,
    )
    if batch_size < 2:
        raise InputError(f"--batch-size {batch_size}: a plan is for batches of 2 or more")
    shape = None if input_shape is None else numbers(input_shape, "--input-shape")
    how = _How(
        verify=verify,
        policy=chosen(policy, "--policy", get_args(Policy)),
        rounds_policy=chosen(rounds_policy, "--rounds-policy", get_args(RoundsPolicy)),
        map_trade_off=trade_off,
        levers=levers,
    )
    graph = traced_network(model, shape, num_classes, chosen(granularity, "--granularity", get_args(Granularity)))
    try:
        solved = _solve(model, graph, own_tiers, spec, how, progress_console)
    except InfeasibleError as error:
        if what_if:
            console.print(what_if_table(_levers(graph, spec, own_tiers, progress_console)))
        if levers == "none":
            raise InfeasibleError(f"{error} (of plain steps; --levers auto may need less)") from error
        raise
    if what_if:
        solved = solved.model_copy(update={"what_if": _levers(graph, spec, own_tiers, progress_console)})
    solved.save(out, force=force)
    write_report(solved, report, force=force, command=command_line())
    if json_output:
        print(solved.model_dump_json(indent=2))
    console.print(plan_table(solved))
    if solved.what_if is not None:
        console.print("", what_if_table(solved.what_if), sep="\n")
    console.print(f"Written: {', '.join(map(str, targets))}", soft_wrap=True, markup=False, highlight=False)


def _tiers(budgets: str | None, file: Path | None, select: str | None) -> tuple[Tier, ...]:
    if budgets is not None and file is None and select is None:
        return equal_tiers(budgets)
    if budgets is None and file is not None:
        return load_tiers(file, select)
    raise InputError("give either --budgets, such as 64,128,256MB, or --tiers FILE, with --select NAMES if you like")


def _levers(graph: "ModelGraph", spec: StepSpec, tiers: tuple[Tier, ...], console: Console) -> WhatIf:
    from slt_planner.planning.what_if import what_if

    with console.status("measuring what cheaper levers would do") as status:
        return what_if(graph, spec, tiers, lambda doing: status.update(f"what if: {doing}"))


class _How(TypedDict):
    """How a plan is to be made."""

    verify: bool
    policy: Policy
    rounds_policy: RoundsPolicy
    map_trade_off: bool
    levers: str


def _solve(
    model: str, graph: "ModelGraph", tiers: tuple[Tier, ...], spec: StepSpec, how: _How, console: Console
) -> Plan:
    from slt_planner.planning.solve import solve

    began, done = time.perf_counter(), {"searching": 0, "measuring": 0}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {
            "searching": bar.add_task(f"{shorten(model)}: configurations foreseen", total=None),
            "measuring": bar.add_task(f"{shorten(model)}: training steps measured", total=None, visible=False),
        }

        def tell(what: str, number: int, of: int | None) -> None:
            done[what] = max(done[what], number)
            bar.update(tasks[what], completed=number, total=of, visible=True)

        solved = solve(graph, tiers, spec, model, tell, **how)
    seconds = time.perf_counter() - began
    measured = f", measured {count(done['measuring'], 'training step')}" if how["verify"] else ""
    looked = count(done["searching"], "configuration")
    console.print(f"{model}: foresaw {looked}{measured} in {seconds:.{1 if seconds < 10 else 0}f} s", markup=False)
    return solved
