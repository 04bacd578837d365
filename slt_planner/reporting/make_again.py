"""The command lines that make a plan or runs again, from their own records."""

import shlex
from collections.abc import Sequence

from slt_planner.config import StepSettings
from slt_planner.errors import InputError
from slt_planner.federated.result import RunResult, RunSettings
from slt_planner.planning.levers import lever_sets
from slt_planner.planning.plan import Plan
from slt_planner.units import parse_bytes

_FLAGS = {"augment": "--no-augmentation"}
"""Options that are named for the other value."""


def plan_command(plan: Plan) -> str:
    """What to type for the same plan, quoted for a shell; options that say nothing new are left out.

    Where a record does not hold what was given (a module in memory, a file of tiers) a word in capitals stands for it.
    """
    step, plain = plan.step, StepSettings()
    words = ["slt-plan", plan.model.name or "MODEL", *_tier_words(plan), "--batch-size", str(plan.batch_size)]
    options: dict[str, tuple[object, object]] = {
        "--optimizer": (step.optimizer.name, plain.optimizer.name),
        "--weight-decay": (step.optimizer.weight_decay, plain.optimizer.weight_decay),
        "--norms": (step.norms, plain.norms),
        "--memory-format": (step.memory_format, plain.memory_format),
        "--precision": (step.precision, plain.precision),
        "--threads": (step.threads, None),
        "--device": (step.device, plain.device),
        "--policy": (plan.policy, "coupled"),
        "--rounds-policy": (plan.rounds_policy, "parameters"),
        "--levers": (_levers(plan), "none"),
        "--granularity": (plan.model.granularity, "layer"),
    }
    words += [word for name, (own, usual) in options.items() if own != usual for word in (name, str(own))]
    words += ["--input-shape", ",".join(map(str, plan.input_shape)), "--num-classes", str(plan.num_classes)]
    flags = {
        "--no-verify": not plan.verified,
        "--no-trade-off": plan.trade_off is None,
        "--what-if": bool(plan.what_if),
    }
    return shlex.join([*words, *(flag for flag, on in flags.items() if on)])


def run_commands(results: Sequence[RunResult]) -> list[str]:
    """What to type for the same runs, quoted for a shell: a command for runs that differ in their strategy alone.

    Options that say nothing new are left out; ``PLAN.json`` stands for the plan's file, which a run does not know.
    """
    alike: dict[str, list[RunResult]] = {}
    for run in results:
        settings = run.settings.model_dump_json(exclude={"strategy"})
        alike.setdefault(settings + run.plan.model_dump_json(), []).append(run)
    return [_run_command(runs) for runs in alike.values()]


def _run_command(runs: Sequence[RunResult]) -> str:
    settings = runs[0].settings.model_dump()
    strategies = ",".join(dict.fromkeys(run.settings.strategy for run in runs))
    words = ["slt-train", "--plan", "PLAN.json", "--strategy", strategies]
    model = runs[0].plan.model
    if model.name and model.is_own_code:
        words += ["--model", model.name]
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if name != "strategy" and value != RunSettings.model_fields[name].default:
            words += [_FLAGS.get(name, option)] if isinstance(value, bool) else [option, str(value)]
    return shlex.join(words)


def _tier_words(plan: Plan) -> list[str]:
    names = [tier.name for tier in plan.tiers]
    if all(_is_its_budget(tier.name, tier.budget_bytes) for tier in plan.tiers):
        return ["--budgets", ",".join(names)]
    return ["--tiers", "FILE.toml", "--select", ",".join(names)]


def _is_its_budget(name: str, budget: int) -> bool:
    try:
        return parse_bytes(name) == budget
    except InputError:
        return False


def _levers(plan: Plan) -> str:
    """What was asked for with --levers, told by the first set and the last: those between differ by version."""
    images = len(plan.input_shape) == 3
    for asked in ("none", "auto", "exact"):
        sets = lever_sets(asked, plan.spec, images)
        if (sets[0], sets[-1]) == (plan.lever_sets[0], plan.lever_sets[-1]):
            return asked
    return ",".join(plan.lever_sets[-1])
