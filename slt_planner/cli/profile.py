"""`slt profile`: what one training step needs, operator by operator, measured and predicted; or several compared."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from slt_planner.cli.common import chosen, consoles, numbers, traced_network, validated
from slt_planner.config import Config, Granularity, StepSpec
from slt_planner.errors import InputError, UnsupportedLayerError, first_invalid
from slt_planner.files import check_writable, refuse_existing, write_bytes
from slt_planner.memory.profile import MemoryProfile, load_profile
from slt_planner.planning.levers import lever_sets
from slt_planner.reporting.figures import png_bytes
from slt_planner.reporting.profile_view import comparison_view, prediction_sentence, profile_view
from slt_planner.reporting.timeline_figure import timeline_figure
from slt_planner.reporting.words import DATA_DEPENDENT

if TYPE_CHECKING:
    from slt_planner.graph.trace import ModelGraph

_FOR_SAVED_PROFILES = ("model", "compare", "picture", "force", "json_output")


def profile(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="resnet20, densenet40, vgg9, convnet, vit_cifar ...; a torchvision network such as resnet50; "
            "timm:NAME; or your own: package.module:factory or ./file.py:Class. Or a saved profile, FILE.json."
        ),
    ],
    config: Annotated[
        str, typer.Option(help="K_F,K_T,s: units frozen, units at full width, scale of the later ones.")
    ] = "0,0,1.0",
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Another configuration, or a saved profile FILE.json, to show beside it; repeatable."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images in one training step.")] = 128,
    micro_batch: Annotated[
        int | None, typer.Option(help="Images at once; the gradients of the batch's pieces are added up.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, adam or adamw.")] = "sgd",
    momentum: Annotated[float, typer.Option(help="Of sgd.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Weight decay; it moves the peak.")] = 1e-3,
    foreach: Annotated[bool, typer.Option("--foreach", help="Update all weights at once; takes more memory.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or autocast (fp32, forward in bf16).")] = "fp32",
    memory_format: Annotated[str, typer.Option(help="contiguous or channels_last.")] = "contiguous",
    norms: Annotated[str, typer.Option(help="Batch norms: static (batch statistics always) or running.")] = "static",
    levers: Annotated[
        str,
        typer.Option(help="How the step is run in less memory: none, exact (all exact ones), or a list with commas."),
    ] = "none",
    threads: Annotated[int | None, typer.Option(help="CPU threads; scratch memory depends on them.")] = None,
    device: Annotated[str, typer.Option(help="Where the step is run: cpu or cuda.")] = "cpu",
    input_shape: Annotated[str | None, typer.Option(help="Of one sample, such as 3,64,64.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, max=10**6, help="Outputs of the network.")] = None,
    granularity: Annotated[
        str, typer.Option(help="Of units: layer, or block, such as a whole residual block.")
    ] = "layer",
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Only predict: for networks that are too large for this machine.")
    ] = False,
    process: Annotated[
        bool, typer.Option("--process", help="Also run the step in a process of its own: its resident memory.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the profile is written [profiles/MODEL-CONFIG-bBATCH.json].")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture of live memory over time is written [beside it, .png].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the profile as JSON on stdout.")] = False,
) -> None:
    """Measure and predict one training step: its peak, by category and unit.

    Prints tables and writes the profile and a picture of live memory over time. Compared configurations are shown, not
    saved.
    """
    console, progress_console = consoles(json_output)
    subjects = _subjects(model, config, compare or [])
    spec = validated(
        StepSpec,
        batch_size=batch_size,
        micro_batch=micro_batch,
        optimizer={"name": optimizer, "momentum": momentum, "weight_decay": weight_decay, "foreach": foreach},
        precision=precision,
        memory_format=memory_format,
        norms=norms,
        threads=threads,
        device=device,
    )
    if levers == "auto":
        raise InputError("--levers auto is for planning; a step has none, all exact ones (exact), or those of a list")
    shape = None if input_shape is None else numbers(input_shape, "--input-shape")
    units = chosen(granularity, "--granularity", get_args(Granularity))
    if process and no_measure:
        raise InputError("--process runs the step and --no-measure does not; give one of them")
    if isinstance(subjects[0], MemoryProfile):
        _refuse_step_options(context)
        if picture and not (subjects[0].timeline and subjects[0].resident):
            raise InputError(f"{model} has no timeline, so there is no picture of it; leave --picture out")
    else:
        out = out or Path("profiles") / f"{_file_name(model, units, subjects[0], batch_size, levers)}.json"
        picture = picture or out.with_suffix(".png")
    _check_targets(out, picture, force)
    request = _Request(model, shape, num_classes, units, spec, levers, not no_measure, process)
    profiles, remarks = zip(*_made(request, subjects, progress_console), strict=True)
    if out:
        profiles[0].save(out, force=force)
    if picture:
        write_bytes(picture, png_bytes(timeline_figure(profiles[0])), force=force)
    if json_output:
        texts = [one.model_dump_json(exclude_none=True) for one in profiles]
        print(f"[{','.join(texts)}]" if compare else texts[0])
    console.print(comparison_view(profiles, remarks) if compare else profile_view(profiles[0], remarks[0]))
    if written := ", ".join(str(path) for path in (out, picture) if path):
        console.print(f"Written: {written}", soft_wrap=True, markup=False, highlight=False)


def _subjects(model: str, config: str, compare: Sequence[str]) -> list[Config | MemoryProfile]:
    """What is shown: saved profiles as they are, and configurations whose profiles are to be made."""
    subjects: list[Config | MemoryProfile] = [
        load_profile(model) if _is_saved(model) else _parsed_config(config, "--config")
    ]
    for text in compare:
        if not _is_saved(text) and _is_saved(model):
            raise InputError(f"--compare {text}: a saved profile is compared with other saved ones, FILE.json")
        subjects.append(load_profile(text) if _is_saved(text) else _parsed_config(text, "--compare"))
    return subjects


def _is_saved(text: str) -> bool:
    return text.endswith(".json")


def _parsed_config(text: str, option: str) -> Config:
    try:
        frozen, full, scale = text.split(",")
        depths, head_scale = (int(frozen), int(full)), float(scale)
    except ValueError as error:
        right = "two whole numbers and a scale up to 1 with commas, such as 4,5,0.5"
        raise InputError(f"{option} {text!r}: give {right}") from error
    try:
        return Config(freeze_depth=depths[0], full_depth=depths[1], head_scale=head_scale)
    except ValidationError as error:
        raise InputError(f"{option} {text}: {first_invalid(error)}") from error


def _refuse_step_options(context: typer.Context) -> None:
    """A saved profile's step is done: options that say how to do one would be ignored."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _FOR_SAVED_PROFILES and source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"--{name.replace('_', '-')} is for a step that is yet to be made, not for a saved profile"
            )


def _file_name(model: str, granularity: Granularity, config: Config, batch_size: int, levers: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[:80] or "network"
    units = "" if granularity == "layer" else f"-{granularity}"
    leaner = "" if levers == "none" else f"-{re.sub('[^a-z0-9_]+', '-', levers)[:80]}"
    return f"{name}{units}-{config.freeze_depth}-{config.full_depth}-{config.head_scale:g}-b{batch_size}{leaner}"


def _check_targets(out: Path | None, picture: Path | None, force: bool) -> None:
    """Refuse, before any long work, names that would not do."""
    for path, suffix in ((out, ".json"), (picture, ".png")):
        if path is None:
            continue
        if path.suffix != suffix:
            raise InputError(f"{path}: must end in {suffix}")
        if not force:
            refuse_existing([path])
        check_writable([path])


@dataclass(frozen=True)
class _Request:
    """Which network and step, and how its profiles are made."""

    model: str
    input_shape: tuple[int, ...] | None
    num_classes: int | None
    granularity: Granularity
    spec: StepSpec
    levers: str
    measured: bool
    process: bool


def _made(
    request: _Request, subjects: Sequence[Config | MemoryProfile], console: Console
) -> list[tuple[MemoryProfile, str]]:
    """The profile of each subject, and what there is to be said of it."""
    configs = [subject for subject in subjects if isinstance(subject, Config)]
    graph = _traced(request, configs) if configs else None
    if graph is not None:
        levers = lever_sets(request.levers, request.spec, images=len(graph.input_shape) == 3)[-1]
        request = replace(request, spec=request.spec.with_levers(levers))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    made = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        for subject in subjects:
            if isinstance(subject, MemoryProfile):
                made.append((subject, ""))
            elif graph is not None:

                def say(text: str, config: Config = subject) -> None:
                    bar.update(task, description=f"{config}: {text}")

                made.append(_profiled(graph, subject, request, say))
    return made


def _traced(request: _Request, configs: Sequence[Config]) -> "ModelGraph":
    """The network's structure; configurations that it does not have are refused."""
    graph = traced_network(request.model, request.input_shape, request.num_classes, request.granularity)
    for config in configs:
        graph.cuts(config)
    return graph


def _profiled(
    graph: "ModelGraph", config: Config, request: _Request, say: Callable[[str], None]
) -> tuple[MemoryProfile, str]:
    """A configuration's profile: measured, with a remark how near its prediction is, or only predicted."""
    from slt_planner.memory.measure import measure
    from slt_planner.submodel.extract import extract

    predicted, remark = _predicted(graph, config, request, say)
    if not request.measured:
        assert predicted is not None  # what cannot be predicted was refused
        return predicted.model_copy(update={"model": request.model}), ""
    say("measuring a training step")
    profile = measure(extract(graph, None, config, request.spec.norms), request.spec)
    if predicted:
        remark = prediction_sentence(profile, predicted)
    process = None
    if request.process:
        from slt_planner.memory.process import measure_process

        say("running the step in a process of its own")
        process = measure_process(
            request.model, config, request.spec, graph.input_shape, request.num_classes, graph.granularity
        )
    return profile.model_copy(update={"model": request.model, "process": process}), remark


def _predicted(
    graph: "ModelGraph", config: Config, request: _Request, say: Callable[[str], None]
) -> tuple[MemoryProfile | None, str]:
    """A prediction; where there can be none, why not. Without a measurement that is an error."""
    from slt_planner.memory.calibrate import calibrate
    from slt_planner.memory.predict import predict

    say("predicting")
    try:
        calibrate(graph, [config], request.spec, lambda done, of: say(f"learned {done} of {of} operators"))
        return predict(graph, config, request.spec), ""
    except UnsupportedLayerError as error:
        if not request.measured:
            raise
        return None, f"Not predicted. {DATA_DEPENDENT}" if graph.adapter.part else f"Not predicted: {error}."
