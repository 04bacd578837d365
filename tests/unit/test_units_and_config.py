"""Amounts of bytes, and the records that everything speaks in."""

import doctest
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slt_planner.config import Config, StepSpec, Tier, equal_tiers
from slt_planner.errors import InputError
from slt_planner.units import format_bytes, parse_budgets, parse_bytes


@given(st.integers(1, 10**6), st.sampled_from([("kB", 10**3), ("MB", 10**6), ("MiB", 2**20), ("GB", 10**9)]))
def test_an_amount_is_its_number_times_its_unit(number, unit):
    assert parse_bytes(f"{number}{unit[0]}") == number * unit[1]
    assert parse_bytes(f" {number} {unit[0].lower()} ") == number * unit[1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("64", "has no unit; write for example 64MB"),
        ("-5MB", "out of range"),
        ("0MB", "out of range"),
        ("9999999TB", "unknown unit 'TB'"),
        ("99999999GB", "out of range"),
        ("much", "not an amount"),
        ("", "not an amount"),
        ("9" * 5000 + "MB", "not an amount"),
        ("64XB", "unknown unit 'XB'; known units are"),
    ],
)
def test_amounts_that_are_refused(text, why):
    with pytest.raises(InputError, match="memory budget") as caught:
        parse_bytes(text)
    assert why in str(caught.value)


def test_a_unit_at_the_end_holds_for_all_that_have_none():
    assert parse_budgets("1GB, 64,128MiB") == {"1GB": 10**9, "64MiB": 64 * 2**20, "128MiB": 128 * 2**20}
    with pytest.raises(InputError, match="given twice"):
        parse_budgets("64,64MB")
    with pytest.raises(InputError, match="has no unit"):
        parse_budgets("64,128")


def test_tiers_come_weakest_first_and_share_equally():
    tiers = equal_tiers(["256MB", "64MB"])
    assert [tier.budget_bytes for tier in tiers] == [64_000_000, 256_000_000]
    assert sum(tier.share for tier in tiers) == 1
    with pytest.raises(InputError, match="no memory budget"):
        equal_tiers("")


@given(st.integers(-2, 6), st.integers(-2, 6), st.floats(-1, 2))
def test_a_config_freezes_less_than_it_holds_at_full_width(freeze_depth, full_depth, head_scale):
    legal = 0 <= freeze_depth <= max(0, full_depth - 1) and full_depth >= 0 and 0 < head_scale <= 1
    try:
        config = Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale)
    except ValidationError:
        assert not legal
    else:
        assert legal
        assert Config.model_validate_json(config.model_dump_json()) == config


def test_records_are_frozen_and_refuse_unknown_fields():
    spec = StepSpec(batch_size=32, optimizer="adamw")
    with pytest.raises(ValidationError):
        spec.batch_size = 64
    with pytest.raises(ValidationError):
        StepSpec(batchsize=32)
    with pytest.raises(ValidationError):
        Tier(name="x", budget_bytes=0, share=1)
    assert spec.settings.optimizer.name == "adamw"
    assert StepSpec(batch_size=32, **spec.settings.model_dump()) == spec


def test_bytes_for_people():
    assert [format_bytes(n) for n in (12, 1500, 209_750_784, 3 * 10**9)] == ["12 B", "1.5 kB", "209.8 MB", "3.0 GB"]
    assert [format_bytes(n) for n in (999_949, 999_999, 5 * 10**13)] == ["999.9 kB", "1.0 MB", "50000.0 GB"]


@given(st.integers(1, 2**49))
def test_what_is_rounded_up_is_enough(number):
    amount = format_bytes(number, round_up=True)
    assert number <= parse_bytes(amount) <= max(number * 1.11, number + 100)


@pytest.mark.parametrize(
    "name",
    [
        "units",
        "config",
        "planning.rounds",
        "planning.tiers",
        "planning.costs",
        "graph.blocks",
        "graph.widths",
        "graph.trace",
        "submodel.extract",
        "memory.measure",
        "models.registry",
        "federated.client",
    ],
)
def test_the_examples_in_the_documentation_hold(name):
    result = doctest.testmod(import_module(f"slt_planner.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
