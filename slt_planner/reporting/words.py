"""The sentences and number formats that all reports share."""

from collections.abc import Sequence
from string import ascii_lowercase

from slt_planner.config import LeverSet, Optimizer, StepSpec
from slt_planner.planning.levers import joined
from slt_planner.planning.plan import Plan, TierPlan
from slt_planner.units import format_bytes

NOTHING = "–"  # noqa: RUF001 - an en dash stands where there is no figure
DATA_DEPENDENT = "This network's shapes depend on data: peaks are for made-up targets; real ones can need more."


def shorten(text: str, limit: int = 40) -> str:
    """A name fit to be shown: no control characters, and an ellipsis where it is longer than `limit`.

    >>> shorten("a rather long name", 10)
    'a rather …'
    """
    head = text[: limit + 1]
    printable = "".join(letter if letter.isprintable() else " " for letter in head)
    return printable if len(text) <= limit else printable[: limit - 1] + "…"


def percent(fraction: float | None) -> str:
    """A fraction in percent, with one decimal.

    >>> percent(0.9921), percent(None)
    ('99.2 %', '–')
    """
    return NOTHING if fraction is None else f"{100 * fraction:.1f} %"


def scale_text(scale: float) -> str:
    """A head scale in percent; what is not all is not 100 %.

    >>> scale_text(11 / 64), scale_text(1.0), scale_text(3071 / 3072)
    ('17.2 %', '100 %', '99.9 %')
    """
    return f"{short_scale(scale)} %"


def short_scale(scale: float) -> str:
    """A head scale in percent without the sign, in four characters at most.

    >>> short_scale(11 / 64), short_scale(1.0), short_scale(1 / 512)
    ('17.2', '100', '0.20')
    """
    percentage = 100 if scale == 1 else min(100 * scale, 99.9)
    return f"{percentage:.3g}" if percentage >= 1 else f"{percentage:.2f}"


def brief_scale(scale: float) -> str:
    """A head scale in whole percent, for a narrow place; what is not all is not 100 %, and what is there is not 0 %.

    >>> brief_scale(11 / 64), brief_scale(1.0), brief_scale(3071 / 3072)
    ('17%', '100%', '99.9%')
    """
    return f"{100 * scale:.0f}%" if scale == 1 or 0.01 <= scale < 0.995 else f"{short_scale(scale)}%"


def reason_text(limited_by: str) -> str:
    """What set a head scale, in words."""
    return limited_by.replace("_", " ")


def model_title(plan: Plan) -> str:
    """The model's name, or its structure where it has none."""
    return shorten(plan.model.name) if plan.model.name else f"a network of {plan.model.depth} units"


def ruler(plan: Plan, spec: StepSpec | None = None) -> str:
    """How a plan's memory was measured, or that of a step made from its own, in one line."""
    levers = ", and each stage's levers" if lever_letters(plan) else ""
    return step_ruler(spec or plan.spec) + levers + (", made-up targets" if plan.model.data_dependent else "")


def step_ruler(spec: StepSpec) -> str:
    """How a step's memory was measured, in one line."""
    parts = ["allocator ruler", spec.device.upper(), batch_words(spec), spec.precision, optimizer_words(spec.optimizer)]
    if spec.memory_format != "contiguous":
        parts.append(spec.memory_format)
    if spec.levers:
        parts.append(f"levers {joined(map(reason_text, spec.levers))}")
    if spec.threads is not None:
        parts.append(count(spec.threads, "thread"))
    return ", ".join(parts)


def batch_words(spec: StepSpec) -> str:
    """The batch of a step and its pieces.

    >>> batch_words(StepSpec(batch_size=32)), batch_words(StepSpec(batch_size=32, micro_batch=8))
    ('batch 32', 'batch 32 in micro-batches of 8')
    """
    return f"batch {spec.batch_size}" + (f" in micro-batches of {spec.micro_batch}" if spec.micro_batch else "")


def optimizer_words(optimizer: Optimizer) -> str:
    """The optimizer as it is written.

    >>> optimizer_words(Optimizer()), optimizer_words(Optimizer(name="adamw"))
    ('SGD momentum 0.9', 'AdamW')
    """
    if optimizer.name == "sgd":
        return f"SGD momentum {optimizer.momentum:g}"
    return optimizer.name.title().replace("w", "W")


def count(number: int, noun: str) -> str:
    """A number and its noun.

    >>> count(1, "stage"), count(12, "stage")
    ('1 stage', '12 stages')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def tier_headline(tier: TierPlan, plan: Plan) -> str:
    """What a tier can do, in one sentence without its name and status."""
    if tier.status == "infeasible":
        return shorten(tier.reason or "no schedule fits", 400)
    tightest = max(stage.peak_bytes for stage in tier.stages) / tier.budget_bytes
    if tier.status == "full":
        if plan.full_network.peak_bytes > tier.budget_bytes:
            return "could train the whole network alone, with levers"
        whole = format_bytes(plan.full_network.peak_bytes)
        return f"trains the whole network alone ({whole})"
    how = how_known(plan)
    each = how if len(tier.stages) == 1 else f"every one {how}"
    return f"{count(len(tier.stages), 'stage')}, {each} within budget, tightest {percent(tightest)}"


def how_known(plan: Plan) -> str:
    """Whether a plan's peaks were measured or predicted, in a word."""
    return "measured" if plan.verified else "predicted"


def lever_letters(plan: Plan) -> dict[LeverSet, str]:
    """A letter for each set of levers that a stage of the plan uses."""
    stages = [stage for tier in plan.tiers for stage in tier.stages]
    used = [levers for levers in plan.lever_sets if levers and any(stage.levers == levers for stage in stages)]
    return dict(zip(used, ascii_lowercase, strict=False))


def lever_lines(plan: Plan) -> list[str]:
    """What the letters stand for, a line each, with what the levers cost in step time."""
    lines: list[str] = []
    earlier: dict[LeverSet, str] = {}
    for levers, letter in lever_letters(plan).items():
        inside = next((own for own in reversed(earlier) if set(own) < set(levers)), ())
        more = [lever for lever in levers if lever not in inside]
        words = joined(([f"those of {earlier[inside]}"] if inside else []) + [reason_text(lever) for lever in more])
        times = [s.relative_time for tier in plan.tiers for s in tier.stages if s.levers == levers and s.relative_time]
        lines.append(f"Levers {letter}: {words}{_times(times)}.")
        earlier[levers] = letter
    return lines


def _times(times: Sequence[float]) -> str:
    if not times:
        return ""
    low, high = f"{min(times):.2f}", f"{max(times):.2f}"
    return f"; a step takes {low if low == high else f'{low} to {high}'} times the plain one's time"


def megabytes(number: int) -> str:
    """Bytes in MB without the unit, with four digits at most before they are only whole MB.

    >>> megabytes(63_500_000), megabytes(2_040_000_000)
    ('63.5', '2040')
    """
    return f"{number / 1e6:.1f}" if number < 999_950_000 else f"{number / 1e6:.0f}"


def byte_unit(largest: float) -> tuple[str, float]:
    """The unit for amounts up to the largest, and its bytes.

    >>> byte_unit(54_273_664), byte_unit(1_200_000_000)
    (('MB', 1000000.0), ('MB', 1000000.0))
    """
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((unit, size) for unit, size in units if largest >= 1.5 * size), ("B", 1.0))
