"""Tiers files: what is in them, what is refused and how, and that no text does anything else."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slt_planner.errors import InputError
from slt_planner.planning.solve import solve
from slt_planner.planning.tiers import load_tiers, parse_tiers
from slt_planner.units import parse_bytes
from tests.unit.test_solve import GRAPH, SPEC

DEVICES = Path(__file__).parents[2] / "profiles" / "devices.toml"
KEYS = ["gflops", "upload_mbit_per_s", "download_mbit_per_s", "power_w", "link_power_w"]
TWO = """
[[tier]]
name = "phone-a"
budget = "128MB"
[[tier]]
name = "camera"
budget = "4 MiB"
"""


def table(**fields):
    """A `[[tier]]` table; JSON writes strings, numbers and lists as TOML does."""
    return "[[tier]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())


def refused(text, select=None):
    with pytest.raises(InputError) as caught:
        parse_tiers(text, select)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tiers_come_weakest_first_and_share_equally_where_nothing_is_said():
    camera, phone = parse_tiers(TWO)
    assert (camera.name, camera.budget_bytes, camera.share) == ("camera", 4 * 2**20, 0.5)
    assert (phone.name, phone.budget_bytes, phone.share) == ("phone-a", 128_000_000, 0.5)
    assert phone.flops_per_s is phone.upload_bytes_per_s is phone.power_w is None


def test_figures_are_turned_into_the_units_of_the_record():
    (tier,) = parse_tiers(
        table(name="x", budget="1GB", gflops=2.5, upload_mbit_per_s=8, download_mbit_per_s=100, power_w=3)
        + "link_power_w = 0.5"
    )
    assert tier.flops_per_s == 2.5e9
    assert (tier.upload_bytes_per_s, tier.download_bytes_per_s) == (1e6, 12.5e6)
    assert (tier.power_w, tier.link_power_w) == (3.0, 0.5)


def test_selected_tiers_have_their_shares_scaled():
    rows = [("a", "1MB", 0.2), ("b", "2MB", 0.5), ("c", "3MB", 0.3)]
    text = "".join(table(name=name, budget=budget, share=share) for name, budget, share in rows)
    assert [tier.share for tier in parse_tiers(text)] == [0.2, 0.5, 0.3]
    assert [(t.name, t.share) for t in parse_tiers(text, "c, a")] == [
        ("a", pytest.approx(0.4)),
        ("c", pytest.approx(0.6)),
    ]
    assert parse_tiers(text, ["b"])[0].share == 1.0
    assert [t.share for t in parse_tiers(TWO, ["camera", "phone-a"])] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no tier in it; write at least one [[tier]]"),
        ("[tier]", "tier: give each tier a table of its own, under [[tier]]"),
        ("tier = 3", "tier: give each tier a table of its own, under [[tier]]"),
        ("tier = [1]", "tier: give each tier a table of its own, under [[tier]]"),
        ("[[tiers]]", "unknown key 'tiers'; known are tier"),
        ("[[tier]", "not TOML ("),
        ("a = " + "9" * 5000, "not TOML ("),
        ("a = " + "[" * 100_000, "not TOML ("),
        (table(budget="4MB"), "tier 1: name: Field required"),
        (table(name=3, budget="4MB"), "tier 1: name: Input should be a valid string"),
        (table(name="a,b", budget="4MB"), "tier 1 ('a,b'): name: use 1 to 40 letters, digits and . _ + -"),
        (table(name="a\nb", budget="4MB"), "tier 1 ('a\\nb'): name: use"),
        (table(name="a"), "tier 1 ('a'): budget: Field required"),
        (table(name="a", budget=4), "tier 1 ('a'): budget: write it in quotes and with its unit"),
        (table(name="a", budget="4"), "tier 1 ('a'): budget: memory budget '4' has no unit; write for example 4MB"),
        (table(name="a", budget="0MB"), "tier 1 ('a'): budget: memory budget '0MB' is out of range"),
        (table(name="a", budget="9" * 5000 + "MB"), "tier 1 ('a'): budget: memory budget '999"),
        (table(name="a", budget="4MB", watts=3), "tier 1 ('a'): unknown key 'watts'; known are name, budget, share, "),
        (table(name="a", budget="4MB", share=0), "tier 1 ('a'): share: Input should be greater than 0"),
        (table(name="a", budget="4MB", share=1.5), "tier 1 ('a'): share: Input should be less than or equal to 1"),
        (table(name="a", budget="4MB") * 2, "tier 2: name: 'a' is taken"),
        (
            table(name="a", budget="4MB", share=0.4) + table(name="b", budget="5MB", share=0.5),
            "share: all shares add up to 0.9; let them add up to 1, or give none",
        ),
        (
            table(name="a", budget="4MB", share=1) + table(name="b", budget="5MB"),
            "tier 'b': share: missing; give every",
        ),
        *[
            (table(name="a", budget="4MB", **{key: wrong}), f"tier 1 ('a'): {key}: Input should be")
            for key in KEYS
            for wrong in (0, -1, "3", True, 1e10, 10**400, [1])
        ],
        *[
            (table(name="a", budget="4MB") + f"{key} = {wrong}", f"tier 1 ('a'): {key}: Input should be")
            for key in KEYS
            for wrong in ("nan", "inf", "1979-05-27", "{}")
        ],
    ],
)
def test_what_is_refused_is_told_with_tier_and_key(text, why):
    assert refused(text).startswith(why)


def test_names_that_are_not_there_are_refused_with_those_that_are():
    assert refused(TWO, "gateway") == "no tier 'gateway'; known are phone-a, camera"
    assert refused(TWO, "") == "no tier ''; known are phone-a, camera"
    assert refused(TWO, []) == "no tier is selected; known are phone-a, camera"
    assert refused(TWO, "camera,camera") == "tier 'camera' is selected twice"


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    with pytest.raises(InputError, match=r"tiers file .*mine\.toml: cannot be read \(No such file"):
        load_tiers(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a text file"):
        load_tiers(path)
    path.write_text(table(name="a", budget="4 apples"))
    with pytest.raises(InputError, match=r"tiers file .*mine\.toml: tier 1 \('a'\): budget: memory budget '4 apples'"):
        load_tiers(path)
    path.write_text(TWO)
    assert load_tiers(path, "camera") == parse_tiers(TWO, "camera")


VALUES = (
    st.text(max_size=8)
    | st.sampled_from(["4MB", "1.5 GiB", "64", "a", "9e9"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.booleans()
    | st.lists(st.integers(), max_size=2)
)
FIELDS = st.dictionaries(
    st.sampled_from(["name", "budget", "share", *KEYS, "other"]), VALUES, max_size=4
) | st.fixed_dictionaries(
    {"name": st.sampled_from("abcd"), "budget": st.sampled_from(["4MB", "5MiB", "1kB"])},
    optional={"share": st.sampled_from([0.25, 0.5, 1.0]), "gflops": st.floats(1e-7, 1e10)},
)
DOCUMENTS = st.lists(FIELDS, max_size=4).map(lambda tables: "".join(table(**fields) for fields in tables))
EDITS = st.tuples(st.integers(0, len(TWO)), st.integers(0, 3), st.text(max_size=3))
EDITED = EDITS.map(lambda edit: TWO[: edit[0]] + edit[2] + TWO[edit[0] + edit[1] :])


@settings(max_examples=500, deadline=None)
@given(st.text() | DOCUMENTS | EDITED, st.none() | st.lists(st.sampled_from("abcd"), max_size=3))
def test_any_text_gives_tiers_or_one_line(text, select):
    refusal = ""
    try:
        tiers = parse_tiers(text, select)
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert len(refusal.splitlines()) == 1
        return
    assert sum(tier.share for tier in tiers) == pytest.approx(1)
    assert len({tier.name for tier in tiers}) == len(tiers) > 0
    assert [tier.budget_bytes for tier in tiers] == sorted(tier.budget_bytes for tier in tiers)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 1000)), min_size=1, max_size=6))
def test_a_valid_file_gives_what_it_says(rows):
    whole = sum(weight for _, weight in rows)
    text = "".join(
        table(name=f"t{i}", budget=f"{size}kB", share=weight / whole) for i, (size, weight) in enumerate(rows)
    )
    found = {tier.name: (tier.budget_bytes, tier.share) for tier in parse_tiers(text)}
    assert found == {f"t{i}": (1000 * size, pytest.approx(weight / whole)) for i, (size, weight) in enumerate(rows)}


def test_the_ready_device_classes():
    tiers = load_tiers(DEVICES)
    assert len(tiers) == 12
    assert {tier.budget_bytes for tier in tiers} >= {parse_bytes("4MB"), parse_bytes("3GB")}
    assert all(None not in tier.model_dump().values() for tier in tiers)
    assert [tier.name for tier in load_tiers(DEVICES, "phone-a,gateway")] == ["phone-a", "gateway"]


def test_a_plan_for_tiers_of_a_file():
    plan = solve(
        GRAPH, parse_tiers(table(name="a", budget="10MB", share=0.7) + table(name="b", budget="12MB", share=0.3)), SPEC
    )
    assert [(tier.name, tier.budget_bytes, tier.share) for tier in plan.tiers] == [
        ("a", 10_000_000, pytest.approx(0.7)),
        ("b", 12_000_000, pytest.approx(0.3)),
    ]
