"""Profiles for people show the records' own numbers, fit 80 columns, and take what is in a name as text."""

import io
import warnings

import pytest
from rich.console import Console

from slt_planner.config import Config, StepSpec
from slt_planner.memory.profile import CATEGORIES, MemoryProfile, ProcessMemory, TimelinePoint, UnitRow
from slt_planner.reporting.figures import png_bytes
from slt_planner.reporting.profile_view import (
    comparison_view,
    fine_bytes,
    prediction_sentence,
    profile_view,
    short,
    short_name,
)
from slt_planner.reporting.timeline_figure import timeline_figure
from tests.unit.test_reporting import NASTY

NAMES = ("conv", "layer1.0.conv1", "encoder.layers.encoder_layer_11.self_attention", "classifier")
FIELDS = ("weights_bytes", "activations_bytes", "gradients_bytes", "optimizer_bytes", "forward_multiply_adds")


def row(index, name, scale=1):
    numbers = {field: scale * index * 10**place for place, field in enumerate(FIELDS, start=1)}
    shape = (16 * index, 32, 32)
    return UnitRow(
        index=index, name=name, kind="Conv2d", output_shape=shape, parameters=7, training_flops=10**9, **numbers
    )


# A step of one convolution: batch, forward, loss, backward, optimizer. Bytes are few, so that sums are seen.
STEP = (
    (64, "batch", "aten::randn", 0),
    (-40, "gradients", "", 0),
    (200, "activations", "aten::convolution", 1),
    (90, "workspace", "aten::convolution", 1),
    (-90, "workspace", "aten::convolution", 1),
    (50, "temporaries", "aten::nll_loss_backward", 4),
    (40, "gradients", "aten::convolution_backward", 1),
    (-250, "activations", "", 1),
    (30, "temporaries", "aten::add", 1),
    (-30, "temporaries", "", 1),
)


def made(names=NAMES, scale=1, measured=True, **changes):
    """The profile of that step, with made-up units."""
    resident = {"weights": 100, "gradients": 40, "optimizer": 100}
    live, timeline, most = sum(resident.values()), [], 0
    now = dict.fromkeys(CATEGORIES, 0) | resident
    for number, (change, category, operator, unit) in enumerate(STEP):
        live += change
        now[category] += change
        point = {"live_bytes": live, "change_bytes": change, "category": category, "operator": operator, "unit": unit}
        timeline.append(TimelinePoint(time_us=1000.0 * number if measured else None, **point))
        if live > most:
            most, at_peak, operator_at_peak, unit_at_peak = live, dict(now), operator, unit
    profile = MemoryProfile(
        model="resnet20",
        config=Config(freeze_depth=1, full_depth=2, head_scale=0.5),
        spec=StepSpec(batch_size=32),
        peak_bytes=most,
        tensor_peak_bytes=most - 10,
        peak_operator=operator_at_peak,
        peak_unit=unit_at_peak,
        device="cpu, 2 threads",
        source="MEASURED" if measured else "PREDICTED",
        batch_size=32,
        breakdown=at_peak,
        resident=resident,
        units=tuple(row(index, name, scale) for index, name in enumerate(names, start=1)),
        timeline=tuple(timeline),
    )
    return profile.model_copy(update=changes)


def printed(view, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(view)
    return console.file.getvalue()


def lines_of(text):
    return {tuple(line.split()[:2]): line for line in text.splitlines()}


def test_numbers_are_written_with_the_digits_that_matter():
    assert [short(n) for n in (0, 999, 1000, 9_994, 99_960, 999_499, 999_500, 10**12)] == [
        "0",
        "999",
        "1.00k",
        "9.99k",
        "100k",
        "999k",
        "1.00M",
        "1.00T",
    ]
    assert short(-1500, signed=True) == "-1.50k"
    assert fine_bytes(1_184_962_312) == "1.18 GB"
    assert all(len(short(10**power)) <= 5 for power in range(21))


@pytest.mark.parametrize("limit", [8, 12, 20])
def test_a_long_name_keeps_its_numbers_and_its_end(limit):
    assert short_name("conv", limit) == "conv"
    assert len(short_name("encoder.layers.encoder_layer_11.self_attention", limit)) <= limit
    assert len(short_name("x" * 500, limit)) <= limit
    for name in NASTY:
        assert short_name(name, limit).isprintable()


def test_names_that_differ_by_a_number_stay_apart():
    names = [f"features.denseblock{b}.denselayer{n}.conv{c}" for b in (1, 4) for n in (1, 16) for c in (1, 2)]
    assert len({short_name(name, 16) for name in names}) == len(names)


def test_the_headline_names_peak_operator_unit_ruler_and_step():
    text = printed(profile_view(made(process=ProcessMemory(before_bytes=400_000_000, peak_bytes=512_345_678)), "Near."))
    assert text.splitlines()[:5] == [
        "resnet20 (1, 2, 0.5): 554 B at the peak (tensor ruler 544 B)",
        "At aten::convolution in unit 1 (conv).",
        "In a process of its own: 512.35 MB resident, 400.00 MB before the step.",
        "Measured: allocator ruler, cpu, 2 threads, batch 32, fp32, SGD momentum 0.9.",
        "Near.",
    ]


def test_on_cuda_what_is_asked_for_and_held_is_told_too():
    profile = made(device="cuda, NVIDIA H200", requested_bytes=500, reserved_bytes=2_097_152)
    text = printed(profile_view(profile))
    assert "Asked for 500 B; the allocator holds 2.10 MB of the device." in text
    assert "allocator ruler, cuda, NVIDIA H200, batch 32" in text


def test_the_view_has_every_category_and_unit_and_their_sums():
    profile = made()
    text = printed(profile_view(profile))
    lines = lines_of(text)
    for category, size in profile.breakdown.items():
        if size:
            assert (category, str(size)) in lines
    assert sum(profile.breakdown.values()) == profile.peak_bytes
    for unit in profile.units:
        line = next(line for line in text.splitlines() if line.split()[:1] in ([str(unit.index)], [f"{unit.index}f"]))
        assert line.split()[-6:] == [short(getattr(unit, field)) for field in FIELDS] + ["1.00G"]
    total = next(line for line in text.splitlines() if line.strip().startswith("all"))
    sums = [short(sum(getattr(unit, field) for unit in profile.units)) for field in FIELDS]
    assert total.split() == ["all", *sums, "4.00G"]
    assert "batch of 32" in text
    assert max(map(len, text.splitlines())) <= 80


def test_frozen_units_are_marked_where_there_are_any():
    text = printed(profile_view(made(config=Config(freeze_depth=2, full_depth=3, head_scale=1.0))))
    assert [line.split()[0] for line in text.splitlines() if "Conv2d" in line] == ["1f", "2f", "3", "4"]
    assert "f: frozen." in text
    assert "f: frozen." not in printed(profile_view(made(config=Config.full_network())))


def test_151_units_with_long_names_and_figures_fit_80_columns():
    names = [f"layer{n // 36}.{n}.conv{n % 3}.with_a_rather_long_path_behind_it" for n in range(151)]
    profile = made(names, scale=987_654)
    text = printed(profile_view(profile))
    assert max(map(len, text.splitlines())) <= 80
    assert sum("Conv2d" in line for line in text.splitlines()) == 151
    compared = printed(comparison_view([profile, made(names, scale=3), made(names)], ["", "", ""]))
    assert max(map(len, compared.splitlines())) <= 80


def test_an_inexact_prediction_says_so():
    predicted = made(measured=False, exact=False, missing=("aten::sort", "aten::topk"))
    assert "without the scratch memory of 2 operators" in printed(profile_view(predicted)).replace("\n", " ")
    sentence = prediction_sentence(made(), predicted)
    assert sentence.startswith("Predicted ")
    assert "2 operators" in sentence


def test_a_prediction_is_held_against_the_measurement():
    measured = made(peak_bytes=22_600_000)
    predicted = made(peak_bytes=22_599_000, tensor_peak_bytes=22_255_040)
    assert prediction_sentence(measured, predicted) == "Predicted 22.60 MB (0.00 % off, tensor ruler 22.26 MB, exact)."
    assert "4.42 % off" in prediction_sentence(measured, made(peak_bytes=23_600_000))


def test_profiles_side_by_side_show_values_and_differences():
    base, other = made(), made(scale=3, peak_bytes=300)
    text = printed(comparison_view([base, other], ["", "predicted well"]))
    assert "predicted well" in text
    peak = next(line for line in text.splitlines() if line.startswith("peak"))
    change = f"{100 * (300 - base.peak_bytes) / base.peak_bytes:+.1f}"
    assert peak.split() == ["peak", str(base.peak_bytes), "B", "300", "B", str(300 - base.peak_bytes), "B", change, "%"]
    totals = [sum(getattr(unit, field) for field in FIELDS[:4]) for unit in base.units]
    first = next(line for line in text.splitlines() if line.split()[:2] == ["1", "conv"])
    assert first.split()[2:] == [short(totals[0]), short(3 * totals[0]), short(2 * totals[0], True), "+200.0", "%"]
    together = next(line for line in text.splitlines() if line.split()[:1] == ["all"])
    assert together.split()[1:3] == [short(sum(totals)), short(3 * sum(totals))]


def test_three_profiles_and_other_networks_are_compared_too():
    text = printed(comparison_view([made(), made(scale=2), made(scale=3)], ["", "", ""]))
    titles = [line.split() for line in text.splitlines() if line.startswith("unit")]
    assert titles == [["unit", "name", "A", "B", "from", "A", "C", "from", "A"]]
    other = printed(comparison_view([made(), made(names=("stem", "head"))], ["", ""]))
    assert "Their units are not the same ones." in other
    assert "unit name" not in other


def test_nothing_is_different_in_a_profile_held_against_itself():
    text = printed(comparison_view([made(), made()], ["", ""]))
    rows = [line for line in text.splitlines() if line.split()[:1] in (["peak"], ["weights"], ["1"], ["all"])]
    assert rows
    assert all(line.endswith("=") for line in rows)


@pytest.mark.parametrize("nasty", NASTY)
def test_what_people_type_is_text_and_breaks_nothing(nasty):
    profile = made(names=(nasty, "b"), model=nasty, peak_operator=nasty, device=nasty)
    for view in (profile_view(profile), comparison_view([profile, profile], ["", ""])):
        text = printed(view)
        assert all(letter.isprintable() or letter == "\n" for letter in text)
        if len(nasty) < 40:
            assert "".join(letter if letter.isprintable() else " " for letter in nasty) in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png_bytes(timeline_figure(profile)).startswith(b"\x89PNG")


def test_a_profile_without_rows_config_or_step_can_be_shown():
    bare = made(model=None, config=None, spec=None, units=(), peak_unit=0, tensor_peak_bytes=None)
    text = printed(profile_view(bare))
    assert text.startswith("a network: ")
    assert "unit" not in text
    assert printed(comparison_view([bare, bare], ["", ""]))
    assert png_bytes(timeline_figure(bare))
