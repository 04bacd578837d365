"""`slt verify` as a user runs it."""

import json

import pytest


@pytest.fixture
def planned(command):
    done = command("slt-plan", "convnet", "--budgets", "40MB", "--batch-size", "4", "--threads", "1")
    assert done.code == 0, done.err


def test_a_fresh_plan_verifies(command, planned):
    done = command("slt", "verify", "plan.json")
    assert done.code == 0
    assert "within budget" in done.out
    data = json.loads(command("slt", "verify", "plan.json", "--json").out)
    assert all(peak["measured_peak_bytes"] <= peak["budget_bytes"] for peak in data["peaks"] if peak["kind"] == "stage")


def test_a_plan_that_does_not_fit_here_is_an_error_of_its_own(command, planned, tmp_path):
    data = json.loads((tmp_path / "plan.json").read_text())
    for tier in data["tiers"]:
        tier["budget_bytes"] //= 2
        for stage in tier["stages"]:
            stage["measured_peak_bytes"] //= 2
            stage["measured_breakdown"] = {"weights": stage["measured_peak_bytes"]}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    done = command("slt", "verify", "plan.json")
    assert done.code == 3
    assert "over budget" in done.out
    assert "more than their tier's budget here" in done.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["no.json"], "cannot be read"),
        (["plan.json", "--device", "tpu"], "give cpu or cuda"),
    ],
)
def test_bad_input_is_one_line(command, planned, words, complaint):
    done = command("slt", "verify", *words)
    assert done.code == 2
    assert complaint in done.err
    assert done.err.count("\n") == 1
