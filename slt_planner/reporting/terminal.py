"""Plans and runs as tables for a terminal, and the sentences and number formats that the other formats share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slt_planner.config import LeverSet, Optimizer, StepSpec
from slt_planner.federated.result import RunResult, RunTier
from slt_planner.planning.levers import joined
from slt_planner.planning.plan import Plan, TierPlan, TierStage
from slt_planner.reporting.left_over import left_over
from slt_planner.units import format_bytes

NOTHING = "–"  # noqa: RUF001 - an en dash stands where there is no figure
_STATUS_STYLE = {"full": "green", "scheduled": "cyan", "infeasible": "red"}
_WIDTH = 80
_TIERS_ABREAST = 3


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


def reason_text(limited_by: str) -> str:
    """What set a head scale, in words."""
    return limited_by.replace("_", " ")


def model_title(plan: Plan) -> str:
    """The model's name, or its structure where it has none."""
    return shorten(plan.model.name) if plan.model.name else f"a network of {plan.model.depth} units"


def ruler(plan: Plan) -> str:
    """How a plan's memory was measured, in one line."""
    return step_ruler(plan.spec) + (", made-up targets" if plan.model.data_dependent else "")


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


def plan_table(plan: Plan) -> RenderableType:
    """A plan for a terminal of 80 columns: a line a tier, then a row a stage."""
    headlines = Table.grid(padding=(0, 2, 0, 0))
    headlines.add_column(no_wrap=True)
    headlines.add_column(no_wrap=True)
    headlines.add_column(overflow="fold")
    for tier in plan.tiers:
        headlines.add_row(
            Text(shorten(tier.name, 20), style="bold"),
            Text(tier.status, style=_STATUS_STYLE[tier.status]),
            Text(tier_headline(tier, plan)),
        )
    abreast = _Columns.of(plan).abreast
    tiers, alike = _worth_a_column(plan, abreast)
    blocks = [tiers[first : first + abreast] for first in range(0, len(tiers), abreast)]
    own_head = ", head scale in %" if plan.policy == "per-tier" else ""
    own_levers = ", levers" if lever_letters(plan) else ""
    note = (
        f"Per tier: units frozen{own_head}, a client's {how_known(plan)} peak in MB and in % of the budget{own_levers}."
    )
    return Group(
        headlines,
        Text(""),
        *(part for block in blocks for part in (_stage_table(plan, block), Text(""))),
        *([Text(f"{', '.join(alike)}: as {tiers[-1].name}, nothing frozen.", style="dim")] if alike else []),
        Text(f"{shorten(plan.binding_tier.name, 20)}: {left_over(plan.binding_tier)}", style="dim"),
        Text(note, style="dim"),
        *[Text(line, style="dim") for line in lever_lines(plan)],
        Text(f"{how_known(plan).title()}: {ruler(plan)}.", style="dim"),
        *([Text(DATA_DEPENDENT, style="yellow")] if plan.model.data_dependent else []),
    )


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


def _worth_a_column(plan: Plan, abreast: int) -> tuple[tuple[TierPlan, ...], list[str]]:
    """The tiers to show stage by stage, and the names of those that do in every stage what the last of these does."""
    tiers = plan.feasible_tiers
    own = {tuple(stage.config for stage in tier.stages): tier for tier in reversed(tiers)}
    if len(tiers) <= abreast or tiers[-1].status != "full":
        return tiers, []
    last = own[tuple(stage.config for stage in tiers[-1].stages)]
    shown = tiers[: tiers.index(last) + 1]
    return shown, [shorten(tier.name, 20) for tier in tiers[len(shown) :]]


DATA_DEPENDENT = "This network's shapes depend on data: peaks are for made-up targets; real ones can need more."


def metric_title(results: Sequence[RunResult]) -> str:
    """What the runs are judged by, in words."""
    words = {"accuracy": "accuracy", "mean_iou": "mean IoU"}
    return " or ".join(dict.fromkeys(words[result.metric] for result in results)) or words["accuracy"]


def plain_table(*titles: str) -> Table:
    """A table without lines, of columns of numbers under these titles."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for title in titles:
        table.add_column(Text(title), justify="right", no_wrap=True, vertical="bottom")
    return table


@dataclass(frozen=True)
class _Columns:
    """How wide the parts of a table of stages are: what all tiers share, and what each has of its own."""

    depth_digits: int
    own_head: bool

    @classmethod
    def of(cls, plan: Plan) -> "_Columns":
        return cls(len(str(plan.model.depth)), plan.policy == "per-tier")

    @property
    def shared(self) -> int:
        return len("stage rounds width ") + (0 if self.own_head else len("head limited by  "))

    @property
    def tier(self) -> int:
        return self.depth_digits + len("  123.4 100%") + (len(" 12.3") if self.own_head else 0)

    @property
    def abreast(self) -> int:
        """How many tiers fit beside one another."""
        return min(_TIERS_ABREAST, (_WIDTH - self.shared + 1) // (self.tier + 1))


def _stage_table(plan: Plan, tiers: Sequence[TierPlan]) -> Table:
    columns = _Columns.of(plan)
    table = plain_table("\nstage", "rounds\n%", "full\nwidth", *([] if columns.own_head else ["head\n%"]))
    if not columns.own_head:
        table.add_column(Text("limited\nby"), no_wrap=True, min_width=11)
    letters = lever_letters(plan)
    bar_width = min(12, (_WIDTH - columns.shared) // len(tiers) - columns.tier - 3)
    for tier in tiers:
        title = f"{shorten(tier.name, columns.tier)}\nfrozen, {'head, ' if columns.own_head else ''}peak"
        # Cells are of one width, and a blank at the end of one would be lost on the right.
        table.add_column(Text(title, justify="right"), justify="left" if letters else "right", no_wrap=True)
        if bar_width >= 4:
            table.add_column("")
    for number, stage in enumerate(plan.stages):
        shared = [str(number), f"{100 * stage.rounds_fraction:.1f}", str(stage.full_depth)]
        if not columns.own_head:
            shared += [short_scale(stage.head_scale), reason_text(stage.limited_by)]
        cells: list[RenderableType] = [*shared]
        for tier in tiers:
            own = tier.stages[number]
            cells.append(_tier_cell(own, tier, columns, letters))
            if bar_width >= 4:
                cells.append(_budget_bar(own, tier, bar_width))
        table.add_row(*cells)
    return table


def _tier_cell(stage: TierStage, tier: TierPlan, columns: _Columns, letters: Mapping[LeverSet, str]) -> Text:
    fraction = stage.peak_bytes / tier.budget_bytes
    head = f" {short_scale(stage.head_scale):>4}" if columns.own_head else ""
    text = Text(f"{stage.freeze_depth:>{columns.depth_digits}}{head} {megabytes(stage.peak_bytes):>5} ")
    text.append(f"{100 * fraction:>3.0f}%", style="yellow" if fraction > 0.95 else "green")
    return text.append(letters.get(stage.levers, " ") if letters else "")


def _budget_bar(stage: TierStage, tier: TierPlan, width: int) -> ProgressBar:
    return ProgressBar(total=tier.budget_bytes, completed=stage.peak_bytes, width=width, pulse=False)


def megabytes(number: int) -> str:
    """Bytes in MB without the unit, with four digits at most before they are only whole MB.

    >>> megabytes(63_500_000), megabytes(2_040_000_000)
    ('63.5', '2040')
    """
    return f"{number / 1e6:.1f}" if number < 999_950_000 else f"{number / 1e6:.0f}"


@dataclass(frozen=True)
class RunGroup:
    """Finished runs that differ in their seed alone, or one stopped run; each member with its own name."""

    label: str
    members: tuple[tuple[str, RunResult], ...]

    @property
    def runs(self) -> tuple[RunResult, ...]:
        """The runs without their names."""
        return tuple(run for _, run in self.members)


def run_labels(results: Sequence[RunResult]) -> list[str]:
    """A name for each run, numbered where several would have the same.

    A run's own title is its strategy and seed; two plans' runs can share it.
    """
    titles = [result.title for result in results]
    labels = []
    for index, title in enumerate(titles):
        alike = titles[:index].count(title)
        labels.append(f"{title} ({alike + 1})" if titles.count(title) > 1 else title)
    return labels


def run_groups(results: Sequence[RunResult]) -> list[RunGroup]:
    """Runs put together that repeat one another with another seed; a stopped run stays alone."""
    found: list[tuple[object, list[tuple[str, RunResult]]]] = []
    for label, result in zip(run_labels(results), results, strict=True):
        settings = result.settings.model_dump(exclude={"seed"})
        key = (settings, result.plan, result.dataset_title, result.head_scale, len(result.rows))
        alike = next((runs for other, runs in found if other == key), None)
        if alike is None or result.status == "stopped":
            found.append((key if result.status == "finished" else object(), [(label, result)]))
        else:
            alike.append((label, result))
    groups: list[RunGroup] = []
    for _, labelled in found:
        label, first = labelled[0]
        if len(labelled) > 1:
            label = f"{first.settings.strategy}, {len(labelled)} seeds"
        elif first.status == "stopped":
            label = f"{label} (stopped)"
        earlier = [group.label for group in groups]
        if label in earlier:
            label = f"{label} ({sum(other.startswith(label) for other in earlier) + 1})"
        groups.append(RunGroup(label, tuple(labelled)))
    return groups


def mean(numbers: Sequence[float | None]) -> float | None:
    """The mean of the numbers that are there, None where none is."""
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None


def tightest_tier(result: RunResult) -> RunTier | None:
    """The tier whose clients came nearest to their budget."""
    measured = [tier for tier in result.tiers if tier.measured_peak_bytes is not None]
    return max(measured, key=lambda tier: (tier.measured_peak_bytes or 0) / tier.budget_bytes, default=None)


def head_scales(result: RunResult) -> str:
    """The head scales a run went through: its one width, or the first and the last."""
    scales = [row.config.head_scale for row in result.rows] or [stage.head_scale for stage in result.plan.stages]
    if result.head_scale is not None or min(scales) == max(scales):
        return scale_text(result.head_scale or scales[0])
    return f"{100 * scales[0]:.3g} to {scale_text(scales[-1])}"


def round_seconds(result: RunResult) -> float | None:
    """Mean seconds of a round."""
    return mean([row.seconds for row in result.rows])


def stopped_sentence(label: str, result: RunResult) -> str:
    """That a run was stopped, and after which round."""
    done = (
        f"after round {result.rows[-1].round} of {result.settings.rounds}"
        if result.rows
        else "before its first round ended"
    )
    return f"{label} was stopped {done}: its figures are not final"


def dataset_titles(results: Sequence[RunResult]) -> str:
    """The data that accuracies were measured on."""
    return "; ".join(dict.fromkeys(shorten(result.dataset_title, 80) for result in results))


def run_table(results: Sequence[RunResult]) -> RenderableType:
    """Runs for a terminal of 80 columns: a row a run, and the mean of runs that differ in their seed alone."""
    labels = run_labels(results)
    table = plain_table(
        "\n\nstrategy",
        "\n\nseed",
        "\n\nrounds",
        "\nhead\nscale",
        "peak /\nbudget\nMB",
        "last 5\nrounds\n%",
        "final,\nbatch\n%",
        "final,\nrunning\n%",
        "\nup\nMB",
        "\ns a\nround",
    )
    table.columns[0].justify = "left"
    for group in run_groups(results):
        for result in group.runs:
            table.add_row(*_run_cells(result))
        if len(group.runs) > 1:
            table.add_row(*_mean_cells(group.runs), style="bold")
    stopped = [
        Text(stopped_sentence(label, result) + ".", style="bold yellow")
        for label, result in zip(labels, results, strict=True)
        if result.status == "stopped"
    ]
    note = (
        f"Test {metric_title(results)} on {dataset_titles(results)}. "
        "Final: with the norms' statistics of the batch / running ones. "
        "Peak: of the tier nearest to its budget, allocator ruler."
    )
    return Group(table, Text(""), *stopped, Text(note, style="dim"))


def _run_cells(result: RunResult) -> list[str]:
    done, asked = len(result.rows), result.settings.rounds
    tier = tightest_tier(result)
    peak = f"{megabytes(tier.measured_peak_bytes or 0)}/{megabytes(tier.budget_bytes)}" if tier else NOTHING
    seconds = round_seconds(result)
    return [
        result.settings.strategy,
        str(result.settings.seed),
        str(asked) if done == asked else f"{done}/{asked}",
        head_scales(result).replace(" to ", "-").replace(" ", ""),
        peak,
        _points(result.mean_last_accuracy),
        _points(result.accuracy_batch_statistics),
        _points(result.accuracy_running_statistics),
        megabytes(result.bytes_up),
        NOTHING if seconds is None else f"{seconds:.1f}",
    ]


def _mean_cells(runs: Sequence[RunResult]) -> list[str]:
    return [
        "mean",
        str(len(runs)),
        "",
        "",
        "",
        _points(mean([run.mean_last_accuracy for run in runs])),
        _points(mean([run.accuracy_batch_statistics for run in runs])),
        _points(mean([run.accuracy_running_statistics for run in runs])),
        "",
        "",
    ]


def _points(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.1f}"
