"""The what-if table against brute force over every lever and every size of micro-batches."""

import io
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from rich.console import Console
from torch import nn

from slt_planner.config import Config, Optimizer, StepSpec, Tier
from slt_planner.errors import InputError
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.trace import trace
from slt_planner.memory.measure import measure
from slt_planner.planning import step_times
from slt_planner.planning.levers import CHANGES, Alternative, WhatIf, joined, severity
from slt_planner.planning.solve import solve
from slt_planner.planning.what_if import what_if
from slt_planner.reporting.what_if_view import what_if_table
from slt_planner.submodel.extract import extract
from slt_planner.units import format_bytes
from tests.unit.test_solve import small_network

SPEC = StepSpec(batch_size=12, threads=1)
FULL = Config.full_network()
LEAN = ("in_place_prefix", "copied_cuts", "lean_norms")
RECOMPUTED = (*LEAN, "recompute")
SMALLEST = {True: 2, False: 1}  # micro-batches, with and without batch norm


def heavy_network():
    """Nearly all of its memory is weights, in layers none of which is large."""
    narrow = [layer for _ in range(5) for layer in (nn.Linear(200, 200), nn.ReLU())]
    stem = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(*stem, nn.Linear(256, 200), nn.ReLU(), *narrow, nn.Linear(200, 3))


GRAPHS = {"light": trace(small_network(), (3, 16, 16)), "heavy": trace(heavy_network(), (3, 16, 16))}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A step counts as long as it has micro-batches, and half as long in bf16: times that are the same every time."""

    def seconds(step):
        spec = step._spec
        return len(spec.pieces(spec.batch_size)) * {"fp32": 1.0, "autocast": 0.6, "bf16": 0.5}[spec.precision]

    monkeypatch.setattr(step_times, "_seconds", seconds)


@cache
def peak(name, **update):
    optimizer = SPEC.optimizer.model_copy(update={"momentum": update.pop("momentum", 0.9)})
    spec = SPEC.model_copy(update={**update, "optimizer": optimizer})
    return measure(extract(GRAPHS[name], None, FULL), spec, details=False).peak_bytes


def largest_micro_batch(name, budget, **update):
    """By measuring every size; the first of those that make pieces of the same size."""
    sizes = [size for size in range(11, 0, -1) if size == -(-12 // -(-12 // size))]
    fitting = (s for s in sizes if s >= SMALLEST[name == "light"] and peak(name, micro_batch=s, **update) <= budget)
    return next(fitting, None)


def tiers(*budgets):
    return [Tier(name=f"tier {i}", budget_bytes=budget, share=1 / len(budgets)) for i, budget in enumerate(budgets)]


def shown(result):
    console = Console(width=80, file=io.StringIO())
    console.print(what_if_table(result))
    return console.file.getvalue()


def chosen(result, number=0):
    return result.alternatives[result.tiers[number].alternative]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_single_lever_is_measured_and_says_what_it_changes(name):
    whole, smallest = peak(name), peak(name, micro_batch=SMALLEST[name == "light"])
    budget = (whole + smallest) // 2
    result = what_if(GRAPHS[name], SPEC, tiers(budget))
    rows = {row.words: row for row in result.alternatives}
    size = largest_micro_batch(name, budget)
    expected = {
        "nothing changed": {},
        "channels_last": {"memory_format": "channels_last"},
        "lean operators": {"levers": LEAN},
        "lean operators and recompute": {"levers": RECOMPUTED},
        "bf16": {"precision": "bf16"},
        "autocast": {"precision": "autocast"},
        "SGD without momentum": {"momentum": 0.0},
        f"micro-batches of {size}": {"micro_batch": size},
    }
    assert set(rows) == set(expected)
    for words, update in expected.items():
        assert rows[words].peak_bytes == peak(name, **update), words
    assert {words for words, row in rows.items() if row.exact} == {
        *("nothing changed", "channels_last", "lean operators", "lean operators and recompute"),
        *([] if name == "light" else [f"micro-batches of {size}"]),
    }
    assert rows["nothing changed"].peak_bytes == solve(GRAPHS[name], ["1GB"], SPEC).full_network.peak_bytes
    assert rows["nothing changed"].relative_time == 1
    assert rows[f"micro-batches of {size}"].relative_time == -(-12 // size)
    assert result.alternatives[0].levers == ()


def test_micro_batches_shrink_activations_not_weights():
    """A light network fits a quarter of its need in small pieces, a heavy one does not: its weights are more."""
    light = what_if(GRAPHS["light"], SPEC, tiers(peak("light") // 3))
    assert chosen(light).levers == (f"micro-batches of {largest_micro_batch('light', peak('light') // 3)}",)
    assert "SLT may not be needed: with micro-batches of" in light.tiers[0].answer
    assert "but batch norm sees one micro-batch at a time" in light.tiers[0].answer
    heavy = what_if(GRAPHS["heavy"], SPEC, tiers(peak("heavy") // 5))
    assert heavy.tiers[0].alternative is None
    standing = 3 * 4 * sum(parameter.numel() for parameter in heavy_network().parameters())
    assert (
        f"weights, gradients and momentum alone need {format_bytes(standing, round_up=True)}" in heavy.tiers[0].answer
    )
    least = min(row.peak_bytes for row in heavy.alternatives)
    assert heavy.tiers[0].answer.endswith(f"it is still {format_bytes(least, round_up=True)}")


def test_a_tier_that_trains_the_whole_network_needs_nothing():
    result = what_if(GRAPHS["light"], SPEC, tiers(peak("light"), peak("light") - 1))
    assert [tier.tier for tier in result.tiers] == ["tier 1", "tier 0"]  # weakest first
    assert result.tiers[1].alternative == 0
    assert result.tiers[1].answer.startswith("SLT is not needed: the whole network trains as it is, in")
    assert result.tiers[0].alternative != 0


def test_what_changes_nothing_is_preferred_to_what_is_faster():
    """Without batch norm micro-batches are the same mathematics; bf16 is faster here, and fits as well."""
    budget = peak("heavy") - 1
    result = what_if(GRAPHS["heavy"], SPEC, tiers(budget))
    best = chosen(result)
    fitting = [row for row in result.alternatives if row.fits(budget)]
    assert any(row.relative_time < best.relative_time for row in fitting)
    assert best.exact
    assert result.tiers[0].answer.startswith("SLT is not needed: with ")
    assert "times the step time" in result.tiers[0].answer


SETTINGS = {
    "precision": {"fp32": (), "bf16": ("number_format",), "autocast": ("number_format",)},
    "memory_format": {"contiguous": (), "channels_last": ()},
    "momentum": {0.9: (), 0.0: ("optimizer",)},
    "levers": {(): (), LEAN: (), RECOMPUTED: ()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_the_combination_is_the_mildest_that_is_enough(name):
    """Against every choice of levers, each with every size of micro-batches, measured."""
    micro = ("batch_statistics",) if name == "light" else ()
    smallest = {}
    for values in product(*SETTINGS.values()):
        update = dict(zip(SETTINGS, values, strict=True))
        changes = tuple(change for key, value in update.items() for change in SETTINGS[key][value])
        count = sum(value != next(iter(SETTINGS[key])) for key, value in update.items())
        smallest[changes, count, values] = peak(name, **update)
        in_pieces = min(peak(name, micro_batch=s, **update) for s in (1, 2, 3, 4, 6) if s >= SMALLEST[name == "light"])
        smallest[changes + micro, count + 1, (*values, "in pieces")] = in_pieces
    single = min(size for (_, count, _), size in smallest.items() if count <= 1)
    least = min(smallest.values())
    budgets = [least - 1, least, (single + least) // 2, single - 1]
    result = what_if(GRAPHS[name], SPEC, tiers(*budgets))
    for number, budget in enumerate(budgets[1:], start=1):
        best = chosen(result, number)
        mildest = min((severity(changes), count) for (changes, count, _), size in smallest.items() if size <= budget)
        assert (severity(best.changes), len(best.levers)) == mildest
        assert best.peak_bytes <= budget
        if best.spec.micro_batch:
            update = {"precision": best.spec.precision, "memory_format": best.spec.memory_format}
            update |= {"momentum": best.spec.optimizer.momentum, "levers": best.spec.levers}
            assert best.spec.micro_batch == largest_micro_batch(name, budget, **update)
    assert result.tiers[0].alternative is None
    assert result.tiers[0].answer.startswith("no lever is enough")
    assert min(row.peak_bytes for row in result.alternatives) == least


def test_leaner_optimizers_of_every_kind_are_tried():
    spec = SPEC.model_copy(update={"optimizer": Optimizer(name="adam", foreach=True), "set_to_none": False})
    rows = {row.words: row for row in what_if(GRAPHS["heavy"], spec, tiers(10**9)).alternatives}
    assert set(rows) == {
        *("nothing changed", "channels_last", "no foreach", "set_to_none", "bf16", "autocast"),
        *("lean operators", "lean operators and recompute"),
        *("SGD momentum 0.9", "SGD without momentum"),
    }
    peaks = [rows[words].peak_bytes for words in ("SGD without momentum", "SGD momentum 0.9", "nothing changed")]
    assert peaks == sorted(peaks)
    assert rows["no foreach"].spec == spec.model_copy(update={"optimizer": Optimizer(name="adam")})
    assert rows["no foreach"].exact
    assert rows["SGD momentum 0.9"].spec.optimizer == Optimizer(name="sgd", momentum=0.9, foreach=True)


class Spectrum(Adapter):
    """A loss for which torch has no bf16 kernel."""

    loss_is_mean = False

    def loss(self, outputs, labels):
        return F.cross_entropy(torch.fft.fft(outputs).abs(), labels)


def test_a_lever_that_the_network_does_not_take_says_why():
    graph = trace(small_network(), (3, 16, 16), adapter=Spectrum())
    result = what_if(graph, SPEC, tiers(peak("light") // 2))
    rows = {row.words: row for row in result.alternatives}
    assert "BFloat16" in rows["bf16"].refused
    assert rows["bf16"].peak_bytes is None
    assert not rows["bf16"].fits(10**12)
    assert "bf16 cannot be used: " in shown(result)
    assert chosen(result).changes == ("batch_statistics", "loss_weights")


def test_where_there_are_no_smaller_batches_there_are_none():
    result = what_if(GRAPHS["light"], SPEC.model_copy(update={"batch_size": 3}), tiers(1000))
    assert not any("micro" in row.words for row in result.alternatives)  # 2 and a single sample
    result = what_if(GRAPHS["light"], SPEC.model_copy(update={"batch_size": 4}), tiers(1000))
    assert {row.spec.micro_batch for row in result.alternatives} == {None, 2}
    with pytest.raises(InputError, match="no CUDA device"):
        what_if(GRAPHS["light"], SPEC.model_copy(update={"device": "cuda"}), tiers(1000))


def test_the_table_fits_a_terminal_and_the_record_a_file():
    told = []
    result = what_if(GRAPHS["light"], SPEC, tiers(1000, peak("light") // 3, 10**9), told.append)
    assert told[:2] == ["the plain step", "bf16"]
    text = shown(result)
    assert max(map(len, text.splitlines())) <= 80
    assert "no lever is enough" in text
    assert "SLT is not needed: the whole network trains as it is" in text
    assert "on this machine" in text
    assert "batch 12, fp32, SGD momentum 0.9, 1 thread" in " ".join(text.split())
    assert WhatIf.model_validate_json(result.model_dump_json()) == result
    data = result.model_dump()
    data["tiers"][0]["alternative"] = 0
    with pytest.raises(ValidationError, match="does not fit"):
        WhatIf.model_validate(data)
    with pytest.raises(ValidationError, match="a peak and times, or a reason"):
        Alternative(spec=SPEC, peak_bytes=7)


def test_words():
    assert joined([]) == ""
    assert joined(["a", "b"]) == "a and b"
    assert severity(()) < severity(("batch_statistics",)) < severity(("number_format",)) < severity(tuple(CHANGES))


def test_steps_run_by_turns_and_their_ratio_is_the_median(monkeypatch):
    turns = []

    def seconds(step):
        turns.append(step._spec.precision)
        if step._spec.precision == "bf16":
            return 2.0 if turns.count("bf16") != 2 else 90.0  # another program had the processor
        return 1.0

    monkeypatch.setattr(step_times, "_seconds", seconds)
    monkeypatch.setattr(step_times, "_MOST_PAIRS", 5)
    rows = {row.words: row for row in what_if(GRAPHS["light"], SPEC, tiers(10**9)).alternatives}
    assert rows["bf16"].relative_time == rows["bf16"].step_s == 2.0
    first = turns.index("bf16")
    assert turns[first - 1 : first + 9] == ["fp32", "bf16"] * 5


def test_times_are_of_real_steps(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(step_times, "_MOST_PAIRS", 10)
    result = what_if(GRAPHS["light"], SPEC, tiers(peak("light", micro_batch=2)))
    assert all(row.step_s > 0 for row in result.alternatives)
    assert chosen(result).spec.micro_batch == 2
    assert chosen(result).relative_time > 1.5  # six passes of two samples instead of one of twelve
