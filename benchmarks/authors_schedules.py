"""The schedules of the paper's authors against ours, both measured: the claimed limit, the real need, what it buys.

    python benchmarks/authors_schedules.py [--out results/authors_schedules.json]

Theirs (github.com/k1l1/SLT) are for a limit: what the whole network, narrowed to 0.125, 0.25 or 0.5, needs, both
sides counted as weights + gradients + output gradients. "Searched" is what their search finds for 0.125, "by hand"
what is shipped with their code. A step is (head scale, share of the layers at full width): of resnet20's 19 layers
int(19 * share) are at full width, and the last of these is trained, so K_F = K_T - 1; a warm-up at the first step's
scale comes first. Their scale s is any number, a layer of C channels keeps max(1, int(s * C)). Ours are legal scales;
the largest one that is not above s (or the narrowest) keeps the same channels everywhere, which is checked.

Every peak is measured on the allocator ruler by the same code, at batch 32, fp32, SGD with momentum 0.9 and weight
decay 1e-3, contiguous, 2 CPU threads. Two things differ from running their code: their classifier sees 256 features
(4x4 average pooling), resnet20's (He et al. 2015) 64, which is less than 0.1 MB; and a sub-model of ours lets go of
each layer's input as soon as it can, where their forward pass holds that of the running group of blocks, 2 to 3 MB in
the later stages. Both are in their favour here.

For each limit: is there a schedule of ours? For each of their schedules: what it needs at most, our schedule for that
same budget beside it, and how many more layers their own schedule could train there without its head changed. Writes
the result as JSON, and as tables beside it (.md). Takes about three minutes.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from torch import nn

import slt_planner as slt
from slt_planner.environment import environment
from slt_planner.files import write_text
from slt_planner.units import format_bytes

RESULT = Path(__file__).parent / "results" / "authors_schedules.json"
LAYERS = 19
SPEC = slt.StepSpec(batch_size=32, optimizer=slt.Optimizer(momentum=0.9, weight_decay=1e-3), threads=2)

# Width of the network whose need is the limit, and steps of (head scale, share of layers at full width).
SCHEDULES: dict[str, tuple[float, tuple[tuple[float, float], ...]]] = {
    "0.125, searched": (
        0.125,
        (
            *((0.062, 0.06), (0.062, 0.11), (0.062, 0.16), (0.078, 0.22), (0.078, 0.27), (0.093, 0.32)),
            *((0.093, 0.37), (0.187, 0.43), (0.187, 0.48), (0.343, 0.53), (0.343, 0.58), (0.484, 0.64)),
            *((0.531, 0.69), (0.781, 0.74), (0.859, 0.79), (1.0, 0.85)),
        ),
    ),
    "0.125, by hand": (
        0.125,
        (
            *((0.03, 0.10), (0.03, 0.15), (0.03, 0.20), (0.03, 0.25), (0.06, 0.30), (0.07, 0.35), (0.08, 0.40)),
            *((0.2, 0.45), (0.2, 0.50), (0.28, 0.55), (0.28, 0.60), (0.4, 0.65), (0.4, 0.70), (0.7, 0.75)),
            *((0.8, 0.80), (1.0, 0.85)),
        ),
    ),
    "0.25, by hand": (
        0.25,
        (
            *((0.185, 0.10), (0.19, 0.15), (0.19, 0.20), (0.25, 0.25), (0.25, 0.30), (0.35, 0.35), (0.35, 0.40)),
            *((0.5, 0.45), (0.5, 0.50), (0.7, 0.55), (0.8, 0.60), (1.0, 0.65)),
        ),
    ),
    "0.5, by hand": (
        0.5,
        (
            *((0.47, 0.10), (0.5, 0.15), (0.55, 0.20), (0.64, 0.25), (0.68, 0.30), (0.83, 0.35), (0.95, 0.40)),
            (1.0, 0.45),
        ),
    ),
}

Peak = Callable[[slt.Config], int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = compared()
    write_text(args.out, json.dumps(result, indent=1) + "\n", force=True)
    write_text(args.out.with_suffix(".md"), page(result), force=True)
    print(page(result))


def compared() -> dict:
    """All limits and all schedules."""
    graph = slt.trace(slt.load_model("resnet20", weights=False), (3, 32, 32))

    @cache
    def peak(config: slt.Config) -> int:
        return slt.measure(slt.extract(graph, None, config), SPEC, details=False).peak_bytes

    whole = peak(slt.Config.full_network())
    limits = {width: peak(narrowed(width)) for width, _ in SCHEDULES.values()}
    return {
        "what": "the authors' schedules and ours: measured peaks of steady training steps, allocator ruler, bytes",
        "model": "resnet20",
        "step": SPEC.model_dump(),
        "device": "cpu",
        "environment": environment(SPEC.threads or 0),
        "whole_network_bytes": whole,
        "limits": [
            {"width": width, "limit_bytes": limit, "ours": ours_for(graph, limit, whole)}
            for width, limit in limits.items()
        ],
        "schedules": [
            {"schedule": name, **beside(graph, steps, limits[width], whole, peak)}
            for name, (width, steps) in SCHEDULES.items()
        ],
    }


def narrowed(scale: float) -> slt.Config:
    """The whole network at one width."""
    return slt.Config(freeze_depth=0, full_depth=0, head_scale=scale)


def their_configs(graph: slt.ModelGraph, steps: Sequence[tuple[float, float]]) -> list[slt.Config]:
    """The configuration of the warm-up and of every step, at legal scales.

    Raises:
        ValueError: a legal scale keeps other channels than their rule.
    """
    warm_up = (steps[0][0], 0.0)
    configs = []
    for scale, share in (warm_up, *steps):
        full_depth = int(LAYERS * share)
        scales = graph.head_scales(full_depth)
        legal = max((s for s in scales if s <= scale), default=scales[0])
        config = slt.Config(freeze_depth=max(0, full_depth - 1), full_depth=full_depth, head_scale=legal)
        if widths(graph, config) != their_widths(graph, full_depth, scale):
            raise ValueError(f"{config} has other widths than their scale {scale}")
        configs.append(config)
    return configs


def widths(graph: slt.ModelGraph, config: slt.Config) -> dict[str, int]:
    """Channels of every convolution of a sub-model."""
    sub = slt.extract(graph, None, config, on_meta=True)
    return {name: module.out_channels for name, module in sub.named_modules() if isinstance(module, nn.Conv2d)}


def their_widths(graph: slt.ModelGraph, full_depth: int, scale: float) -> dict[str, int]:
    """The same by their rule: max(1, int(s * C)) behind the layers at full width."""
    unit_of = graph.unit_of_tensor()
    return {
        name: module.out_channels
        if unit_of[f"{name}.weight"] <= full_depth
        else max(1, int(scale * module.out_channels))
        for name, module in graph.modules.items()
        if isinstance(module, nn.Conv2d)
    }


def ours_for(graph: slt.ModelGraph, budget: int, whole: int) -> dict:
    """What the planner says of a budget; a tier that holds the whole network makes a plan of every answer."""
    tiers = [slt.Tier(name=name, budget_bytes=size, share=0.5) for name, size in (("limit", budget), ("whole", whole))]
    answer = slt.solve(graph, tiers, SPEC, "resnet20").tiers[0]
    return {
        "status": answer.status,
        "reason": answer.reason,
        "smallest_budget_bytes": answer.smallest_budget_bytes,
        "stages": [
            {
                **stage.config.model_dump(),
                "measured_peak_bytes": stage.measured_peak_bytes,
                "trainable_parameters": stage.trainable_parameters,
            }
            for stage in answer.stages
        ],
    }


def beside(graph: slt.ModelGraph, steps: Sequence[tuple[float, float]], limit: int, whole: int, peak: Peak) -> dict:
    """One of their schedules, and ours for what theirs needs at most; a row a stage of theirs."""
    configs = their_configs(graph, steps)
    need = max(peak(config) for config in configs)
    ours = ours_for(graph, need, whole)["stages"]
    rows = []
    for stage, (config, (scale, _)) in enumerate(zip(configs, (steps[0], *steps), strict=True)):
        more_trained = least_frozen(config, need, peak)
        rows.append(
            {
                "stage": stage,
                "full_depth": config.full_depth,
                "theirs": {
                    "their_scale": scale,
                    **config.model_dump(),
                    "measured_peak_bytes": peak(config),
                    "over_limit_bytes": peak(config) - limit,
                    "over_limit_percent": round((peak(config) / limit - 1) * 100, 1),
                    "trainable_parameters": trained_parameters(graph, config),
                },
                # A schedule of ours moves on one layer a stage, too, and keeps its last stage.
                "ours": ours[min(config.full_depth, len(ours) - 1)],
                "theirs_freezing_less": {
                    "freeze_depth": more_trained.freeze_depth,
                    "measured_peak_bytes": peak(more_trained),
                },
            }
        )
    return {
        "limit_bytes": limit,
        "needed_bytes": need,
        "needed_over_limit": round(need / limit, 3),
        "stages_over_limit": sum(row["theirs"]["over_limit_bytes"] > 0 for row in rows),
        "our_stages": len(ours),
        "rows": rows,
    }


def least_frozen(config: slt.Config, budget: int, peak: Peak) -> slt.Config:
    """Freeze a layer less as long as it fits."""
    while config.freeze_depth > 0:
        less = config.model_copy(update={"freeze_depth": config.freeze_depth - 1})
        if peak(less) > budget:
            break
        config = less
    return config


def trained_parameters(graph: slt.ModelGraph, config: slt.Config) -> int:
    sub = slt.extract(graph, None, config, on_meta=True)
    return sum(p.numel() for p in sub.parameters() if p.requires_grad)


def page(result: dict) -> str:
    """The result as Markdown."""
    where, step = result["environment"], result["step"]
    lines = [
        "# The authors' schedules and ours",
        "",
        "Made by `benchmarks/authors_schedules.py`, whose first lines say what is compared and how. Every peak is",
        f"measured: {result['model']}, allocator ruler, {result['device']} ({where['processor']}), "
        f"{where['threads']} threads, torch {where['torch']},",
        f"batch {step['batch_size']}, {step['precision']}, SGD momentum {step['optimizer']['momentum']}, weight decay "
        f"{step['optimizer']['weight_decay']}, {step['memory_format']}. The whole network needs "
        f"{format_bytes(result['whole_network_bytes'])}.",
        "",
        "## What their limits are, and what ours says of them",
        "",
        "| the limit: the network narrowed to | needs, bytes | ours for this budget |",
        "|---:|---:|---|",
        *(f"| {entry['width']} | {entry['limit_bytes']:,} | {answer(entry['ours'])} |" for entry in result["limits"]),
        "",
        "## What they need, and what ours gets of it",
        "",
        "Each schedule of theirs, stage by stage: layers at full width (*full*; 0 is the warm-up) and *frozen*, the",
        "head's scale and how many of 64 channels that is, the peak and by how much it is over the limit. Beside it",
        "our schedule for the peak that theirs really needs, and how many times as much head and as many trained",
        "parameters that gives. The last column says how many more layers theirs could train within the same memory,",
        "with its own head.",
        "",
    ]
    for schedule in result["schedules"]:
        lines += [*section(schedule), ""]
    return "\n".join(lines).rstrip() + "\n"


def answer(ours: dict) -> str:
    if ours["status"] == "infeasible":
        return f"infeasible: {ours['reason']} ({ours['smallest_budget_bytes']:,} bytes)"
    heads = ", ".join(of_64(stage["head_scale"]) for stage in ours["stages"])
    return f"{ours['status']} in {len(ours['stages'])} stages, heads {heads}"


def of_64(scale: float) -> str:
    """A legal scale of resnet20 as channels of its widest layers."""
    return f"{round(scale * 64)}/64"


def section(schedule: dict) -> list[str]:
    rows = schedule["rows"]
    return [
        f"### {schedule['schedule']}",
        "",
        f"Limit {schedule['limit_bytes']:,} bytes; needed are {schedule['needed_bytes']:,}, "
        f"{schedule['needed_over_limit']:.2f} times as much; {schedule['stages_over_limit']} of {len(rows)} stages are "
        f"over the limit. With this memory ours scales nothing any more from {schedule['our_stages'] - 1} layers at "
        f"full width on, theirs from {rows[-1]['full_depth']}.",
        "",
        "| full | theirs: frozen | head | peak, bytes | over the limit, bytes | % "
        "| ours: frozen | head | peak, bytes | times the head | times the trained parameters "
        "| theirs could train more |",
        "|---:|---:|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
        *map(line, rows),
    ]


def line(row: dict) -> str:
    theirs, ours = row["theirs"], row["ours"]
    cells = [
        row["full_depth"],
        theirs["freeze_depth"],
        f"{theirs['their_scale']:g}: {of_64(theirs['head_scale'])}",
        f"{theirs['measured_peak_bytes']:,}",
        f"{theirs['over_limit_bytes']:+,}",
        f"{theirs['over_limit_percent']:+.1f}",
        ours["freeze_depth"],
        of_64(ours["head_scale"]),
        f"{ours['measured_peak_bytes']:,}",
        f"{ours['head_scale'] / theirs['head_scale']:.2f}",
        f"{ours['trainable_parameters'] / theirs['trainable_parameters']:.2f}",
        theirs["freeze_depth"] - row["theirs_freezing_less"]["freeze_depth"],
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
