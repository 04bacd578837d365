"""Memory profiles for people, as tables: one alone, several side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slt_planner.memory.profile import CATEGORIES, MemoryProfile, UnitRow
from slt_planner.reporting.looks import CATEGORY_COLOURS
from slt_planner.reporting.plan_table import plain_table
from slt_planner.reporting.words import NOTHING, batch_words, count, optimizer_words, percent, shorten

_WIDTH = 80
_BAR_WIDTH = 46
_ABREAST = 2  # profiles beside the first
_KIND_WIDTH, _SHAPE_WIDTH, _LEAST_NAME_WIDTH = 8, 11, 12
_FIGURE_TITLES = ("weight\nbytes", "saved\nbytes", "grads\nbytes", "optim\nbytes", "forw.\nmadds", "train\nFLOPs")


def fine_bytes(number: int, signed: bool = False) -> str:
    """An amount of bytes in decimal units with two decimal places.

    >>> fine_bytes(22_554_048), fine_bytes(512), fine_bytes(-31_719_616, signed=True)
    ('22.55 MB', '512 B', '-31.72 MB')
    """
    sign = "+" if signed else ""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(number) >= size:
            return f"{number / size:{sign}.2f} {unit}"
    return f"{number:{sign}} B"


def short(number: int | None, signed: bool = False) -> str:
    """A number with three digits and a letter for its thousands: k, M, G, T.

    >>> short(14_155_776), short(640), short(999_950), short(-2_359_296, signed=True), short(None)
    ('14.2M', '640', '1.00M', '-2.36M', '–')
    """
    if number is None:
        return NOTHING
    sign = "+" if signed else ""
    if abs(number) < 1000:
        return f"{number:{sign}}"
    value, letters = number / 1000, iter("kMGTPEZ")
    letter = next(letters)
    while abs(value) >= 999.5 and letter != "Z":
        value, letter = value / 1000, next(letters)
    return f"{value:{sign}#.3g}".rstrip(".") + letter


def short_name(name: str, limit: int) -> str:
    """A module's path fit to be shown: where it is too long, its outer parts by letter and number.

    >>> short_name("encoder.layers.encoder_layer_11.mlp.3", 20), short_name("one_very_long_word", 10)
    ('e.l.e11.mlp.3', 'one…g_word')
    """
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > limit:
            parts[place] = part[:1] + part[len(part.rstrip("0123456789")) :] if part[:1].isalpha() else part
    fitting = ".".join(parts)
    if len(fitting) <= limit:
        return shorten(fitting, limit)
    head, tail = limit // 3, limit - limit // 3 - 1
    return f"{shorten(fitting[:head], head)}…{shorten(fitting[-tail:], tail)}"


def profile_title(profile: MemoryProfile) -> str:
    """The model and its configuration."""
    name = shorten(profile.model) if profile.model else "a network"
    return f"{name} {profile.config}" if profile.config else name


def profile_ruler(profile: MemoryProfile) -> str:
    """Where the numbers come from and of which step they are, in one line."""
    spec = profile.spec
    parts = ["allocator ruler", shorten(profile.device), batch_words(spec) if spec else f"batch {profile.batch_size}"]
    if spec:
        parts += [spec.precision, optimizer_words(spec.optimizer)]
        parts += ["foreach"] if spec.optimizer.foreach else []
        parts += [spec.memory_format] if spec.memory_format != "contiguous" else []
        parts += [f"{spec.norms} norms"] if spec.norms != "static" else []
        parts += [count(len(spec.levers), "lever")] if spec.levers else []
    return f"{profile.source.title()}: {', '.join(parts)}"


def peak_place(profile: MemoryProfile) -> str:
    """The operator that was running at the peak, and its unit."""
    operator, name = shorten(profile.peak_operator, 30), profile.unit_name(profile.peak_unit)
    if not profile.peak_unit:
        return operator
    return f"{operator} in unit {profile.peak_unit}" + (f" ({short_name(name, 24)})" if name else "")


def prediction_sentence(measured: MemoryProfile, predicted: MemoryProfile) -> str:
    """How near a prediction comes to the measurement."""
    off = abs(predicted.peak_bytes - measured.peak_bytes) / max(1, measured.peak_bytes)
    parts = [f"{100 * off:.2f} % off"]
    if predicted.tensor_peak_bytes is not None:
        parts.append(f"tensor ruler {fine_bytes(predicted.tensor_peak_bytes)}")
    parts.append("exact" if predicted.exact else _inexact(predicted))
    return f"Predicted {fine_bytes(predicted.peak_bytes)} ({', '.join(parts)})."


def _inexact(profile: MemoryProfile) -> str:
    return f"without the scratch memory of {count(len(profile.missing), 'operator')}, which is not known here"


def profile_view(profile: MemoryProfile, remark: str = "") -> RenderableType:
    """A profile for a terminal of 80 columns: the peak (and a remark on it), what it consists of, and a row a unit."""
    parts: list[RenderableType] = [*_headline(profile, remark=remark), Text(""), _categories(profile)]
    if profile.units:
        notes = [Text(note, style="dim") for note in _unit_notes(profile)]
        parts += [Text(""), _unit_table(profile), Text(""), *notes]
    return Group(*parts)


def _headline(profile: MemoryProfile, label: str = "", remark: str = "") -> list[Text]:
    """What is said of a profile above its tables, a line or two each."""
    tensors = profile.tensor_peak_bytes
    ruler = "" if tensors is None else f" (tensor ruler {fine_bytes(tensors)})"
    peak = f"{fine_bytes(profile.peak_bytes)} at the peak{ruler}"
    lines = [Text(f"{label}{profile_title(profile)}: {peak}", style="bold"), Text(f"At {peak_place(profile)}.")]
    if profile.requested_bytes is not None and profile.reserved_bytes is not None:
        asked, held = fine_bytes(profile.requested_bytes), fine_bytes(profile.reserved_bytes)
        lines.append(Text(f"Asked for {asked}; the allocator holds {held} of the device."))
    if process := profile.process:
        before, most = fine_bytes(process.before_bytes), fine_bytes(process.peak_bytes)
        lines.append(Text(f"In a process of its own: {most} resident, {before} before the step."))
    if not profile.exact:
        lines.append(Text(f"Too low: {_inexact(profile)}.", style="yellow"))
    lines.append(Text(f"{profile_ruler(profile)}.", style="dim"))
    return [*lines, Text(remark)] if remark else lines


def _categories(profile: MemoryProfile) -> Table:
    """What is alive at the peak, the largest first."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    table.add_column()
    whole = max(1, profile.peak_bytes)
    for category, size in sorted(profile.breakdown.items(), key=lambda item: -item[1]):
        if size:
            bar = Bar(whole, 0, size, width=_BAR_WIDTH, color=CATEGORY_COLOURS[category])
            table.add_row(Text(category), Text(fine_bytes(size)), Text(percent(size / whole)), bar)
    return table


def _figures(row: UnitRow) -> tuple[int | None, ...]:
    """The numbers of a unit in the order of their columns."""
    return (
        row.weights_bytes,
        row.activations_bytes,
        row.gradients_bytes,
        row.optimizer_bytes,
        row.forward_multiply_adds,
        row.training_flops,
    )


def _sums(rows: Sequence[UnitRow]) -> list[int | None]:
    """The sum of each column; None where a number is missing."""
    columns = zip(*map(_figures, rows), strict=True)
    return [None if None in column else sum(n for n in column if n is not None) for column in columns]


def _unit_table(profile: MemoryProfile) -> Table:
    rows = profile.units
    kinds = [shorten(row.kind, _KIND_WIDTH) for row in rows]
    shapes = [shorten("x".join(map(str, row.output_shape)), _SHAPE_WIDTH) for row in rows]
    figures = [list(map(short, _figures(row))) for row in rows] + [list(map(short, _sums(rows)))]
    numbers = [f"{row.index}{_mark(profile, row.index)}" for row in rows]
    table = plain_table("\nunit")
    for title in ("name", "kind", "output"):
        table.add_column(Text(f"\n{title}"), no_wrap=True)
    for title in _FIGURE_TITLES:
        table.add_column(Text(title, justify="right"), justify="right", no_wrap=True)
    columns = [["unit", *numbers], ["kind", *kinds], ["output", *shapes]]
    columns += [
        [*title.split("\n"), *cells] for title, *cells in zip(_FIGURE_TITLES, *figures, strict=True)
    ]  # a column is as wide as its widest cell, and a space follows it
    name_width = max(_LEAST_NAME_WIDTH, _WIDTH - sum(1 + max(map(len, column)) for column in columns) - 1)
    for row, number, kind, shape, cells in zip(rows, numbers, kinds, shapes, figures, strict=False):
        words = [number, short_name(row.name, name_width), kind, shape, *cells]
        style = "bold" if row.index == profile.peak_unit else "dim" if _frozen(profile, row.index) else ""
        table.add_row(*map(Text, words), style=style)
    table.add_row(*map(Text, ["", "all", "", "", *figures[-1]]), style="bold")
    return table


def _frozen(profile: MemoryProfile, unit: int) -> bool:
    return profile.config is not None and 0 < unit <= profile.config.freeze_depth


def _mark(profile: MemoryProfile, unit: int) -> str:
    """What follows a unit's number: f where it is frozen, and a place for it in such a table."""
    if not profile.config or not profile.config.freeze_depth:
        return ""
    return "f" if _frozen(profile, unit) else " "


def in_pieces(profile: MemoryProfile) -> bool:
    """The step is of more than one micro-batch."""
    return profile.spec is not None and len(profile.spec.pieces(profile.spec.batch_size)) > 1


def _unit_notes(profile: MemoryProfile) -> list[str]:
    at_once = "most at once, " if in_pieces(profile) else ""
    notes = [
        f"Bytes of a batch of {profile.batch_size}; saved: for backward, {at_once}in the unit that saved them first.",
        "madds: forward pass of a sample, a multiply and its add are one; FLOPs: its whole step, they are two. Both "
        "count convolutions and matrix products.",
    ]
    if profile.config and profile.config.freeze_depth:
        notes.append("f: frozen.")
    if profile.config and profile.config.head_scale < 1:
        notes.append("Output: the whole network's; in a scaled head it is narrower.")
    return [*notes[:2], *([" ".join(notes[2:])] if notes[2:] else [])]


def comparison_view(profiles: Sequence[MemoryProfile], remarks: Sequence[str]) -> RenderableType:
    """Profiles, each with a remark, side by side for a terminal of 80 columns: each against the first, which is A."""
    letters = [chr(ord("A") + number) for number in range(len(profiles))]
    same_units = len({tuple((row.index, row.name) for row in profile.units) for profile in profiles}) == 1
    parts: list[RenderableType] = []
    for letter, profile, remark in zip(letters, profiles, remarks, strict=True):
        parts += [*_headline(profile, f"{letter}  ", remark), Text("")]
    for first in range(1, len(profiles), _ABREAST):
        block = [profiles[0], *profiles[first : first + _ABREAST]]
        names = [letters[0], *letters[first : first + _ABREAST]]
        parts += [_category_comparison(block, names), Text("")]
        if same_units and profiles[0].units:
            parts += [_unit_comparison(block, names), Text("")]
    note = "Units: bytes of weights, saved activations, gradients and optimizer together, of the whole batch."
    return Group(*parts, Text(note if same_units else "Their units are not the same ones.", style="dim"))


@dataclass(frozen=True)
class _Compared:
    """A row of a comparison: what it is of, and each profile's bytes."""

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    style: str = ""


def _category_comparison(profiles: Sequence[MemoryProfile], letters: Sequence[str]) -> Table:
    """The peak, and each category at it."""
    rows = [_Compared(("peak",), tuple(profile.peak_bytes for profile in profiles), "bold")]
    rows += [_Compared((name,), tuple(profile.breakdown.get(name, 0) for profile in profiles)) for name in CATEGORIES]
    return _compared_table(("",), [row for row in rows if any(row.sizes)], letters, fine_bytes)


def _unit_comparison(profiles: Sequence[MemoryProfile], letters: Sequence[str]) -> Table:
    """All bytes of each unit."""
    name_width = _WIDTH - 5 - 10 * (1 + _columns_each(letters) * (len(letters) - 1))
    totals = [[_total(row) for row in profile.units] for profile in profiles]
    rows = [
        _Compared((f"{row.index:>4}", short_name(row.name, name_width)), sizes)
        for row, sizes in zip(profiles[0].units, zip(*totals, strict=True), strict=True)
    ]
    rows.append(_Compared(("", "all"), tuple(map(sum, totals)), "bold"))
    return _compared_table(("unit", "name"), rows, letters, short)


def _total(row: UnitRow) -> int:
    return row.weights_bytes + row.activations_bytes + row.gradients_bytes + row.optimizer_bytes


def _compared_table(
    titles: Sequence[str], rows: Sequence[_Compared], letters: Sequence[str], write: Callable[[int, bool], str]
) -> Table:
    """A's bytes, and for each other one its bytes and how they differ; where it is only one, also by how many bytes."""
    single = _columns_each(letters) == 3
    table = plain_table(*titles)
    for column in table.columns:
        column.justify = "left"
    for title in (letters[0], *(title for letter in letters[1:] for title in (letter, *["B - A"] * single, "from A"))):
        table.add_column(Text(title), justify="right", no_wrap=True, min_width=9)
    for row in rows:
        first, *others = row.sizes
        cells = [*row.labels, write(first, False)]
        for other in others:
            cells += [write(other, False), *[write(other - first, other != first)] * single, _change(first, other)]
        table.add_row(*map(Text, cells), style=row.style)
    return table


def _columns_each(letters: Sequence[str]) -> int:
    """How many columns there are for a profile that is held against A."""
    return 3 if len(letters) == 2 else 2


def _change(first: int, other: int) -> str:
    """From one number to the other, in percent."""
    if other == first:
        return "="
    if not first:
        return NOTHING
    change = 100 * (other - first) / first
    return f"{change:+.1f} %" if abs(change) < 1000 else f"{short(round(change), signed=True)} %"
