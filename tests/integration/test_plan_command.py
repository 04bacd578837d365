"""The ways to ask `slt-plan`: predictions alone, tiers of a file, policies, blocks, and cheaper levers."""

import json

import pytest

from slt_planner.planning.plan import load_plan

CONVNET = ("slt-plan", "convnet", "--batch-size", "4", "--threads", "1")
TIERS = """
[[tier]]
name = "camera"
budget = "34MB"
share = 0.75
gflops = 3
power_w = 2.1

[[tier]]
name = "hub"
budget = "200MB"
share = 0.25
"""


@pytest.fixture
def tiers_file(tmp_path):
    (tmp_path / "tiers.toml").write_text(TIERS)
    return "tiers.toml"


def test_a_plan_on_predictions_says_so_and_verifies(command, tmp_path):
    done = command(*CONVNET, "--budgets", "34MB", "--no-verify", "--no-trade-off")
    assert done.code == 0, done.err
    assert "measured" not in done.out + done.err
    assert "Predicted: allocator ruler" in done.out
    plan = load_plan(tmp_path / "plan.json")
    assert not plan.verified
    assert plan.full_network.source == "PREDICTED"
    assert plan.trade_off is None
    (tier,) = plan.tiers
    assert all(stage.measured_peak_bytes is None for stage in (*tier.stages, *tier.proofs))
    verified = json.loads(command("slt", "verify", "plan.json", "--json").out)
    assert {peak["measured_peak_bytes"] - peak["planned_peak_bytes"] for peak in verified["peaks"]} == {0}


@pytest.mark.slow
def test_a_plan_uses_levers_where_it_is_asked_to(command, tmp_path):
    """Those of a list, the cheapest set that fits; what plain steps lack is said, and who could do with less."""
    network = (
        "slt-plan",
        "resnet20",
        "--granularity",
        "block",
        "--batch-size",
        "8",
        "--threads",
        "1",
        "--no-trade-off",
    )
    refused = command(*network, "--budgets", "4.6MB")
    assert refused.code == 3
    assert refused.err.endswith("(of plain steps; --levers auto may need less)\n")
    done = command(*network, "--budgets", "4.6MB", "--levers", "lean_norms,copied_cuts,channels_last")
    assert done.code == 0, done.err
    plan = load_plan(tmp_path / "plan.json")
    assert plan.lever_sets == ((), ("copied_cuts", "lean_norms", "channels_last"))
    (tier,) = plan.tiers
    assert plan.lever_sets[1] in {stage.levers for stage in tier.stages}
    text = " ".join(done.out.split())
    assert "Levers a: copied cuts, lean norms and channels last; a step takes" in text
    assert "Levers a: copied cuts, lean norms and channels last" in (tmp_path / "reports" / "plan.html").read_text()
    assert all(len(line) <= 80 for line in done.out.splitlines() if not line.startswith("Written"))
    wrong = command(*network, "--budgets", "4MB", "--levers", "magic", "--force")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("slt-plan: error: --levers 'magic': known are auto, none, exact, or a list of")


def test_the_same_plan_again_is_the_same(command, tmp_path):
    asked = (*CONVNET, "--budgets", "34,36MB", "--force")
    first, forecasts = command(*asked), (tmp_path / "plan.json").read_text()
    assert first.code == 0, first.err
    assert command(*asked).code == 0
    assert (tmp_path / "plan.json").read_text() == forecasts


def test_tiers_of_a_file_keep_their_shares_and_figures(command, tmp_path, tiers_file):
    done = command(*CONVNET, "--tiers", tiers_file, "--no-verify")
    assert done.code == 0, done.err
    camera, hub = load_plan(tmp_path / "plan.json").tiers
    assert (camera.name, camera.share, camera.flops_per_s, camera.power_w) == ("camera", 0.75, 3e9, 2.1)
    assert (hub.name, hub.status, hub.flops_per_s) == ("hub", "full", None)
    one = command(*CONVNET, "--tiers", tiers_file, "--select", "hub", "--no-verify", "--force")
    assert one.code == 0, one.err
    assert [(tier.name, tier.share) for tier in load_plan(tmp_path / "plan.json").tiers] == [("hub", 1.0)]


def test_policies_rounds_and_blocks_are_in_the_plan(command, tmp_path):
    done = command(
        *("slt-plan", "resnet20", "--budgets", "6,7MB", "--batch-size", "8", "--no-verify", "--no-trade-off"),
        *("--policy", "per-tier", "--rounds-policy", "equal", "--granularity", "block"),
    )
    assert done.code == 0, done.err
    plan = load_plan(tmp_path / "plan.json")
    assert (plan.policy, plan.rounds_policy, plan.model.granularity) == ("per-tier", "equal", "block")
    assert len({stage.rounds_fraction for stage in plan.stages}) == 1
    weak, strong = plan.tiers
    wider = [more.head_scale - less.head_scale for less, more in zip(weak.stages, strong.stages, strict=True)]
    assert min(wider) >= 0 < max(wider)
    few = ("--clients", "100", "--cohort-size", "2")
    trained = command("slt-train", "--plan", "plan.json", "--rounds", len(plan.stages), *few, "--out", "run")
    assert trained.code == 0, trained.err


def test_what_if_answers_each_tier_whether_or_not_there_is_a_schedule(command, tmp_path, tiers_file):
    done = command(*CONVNET, "--tiers", tiers_file, "--what-if", "--no-verify", "--no-trade-off")
    assert done.code == 0, done.err
    plan = load_plan(tmp_path / "plan.json")
    assert [answer.tier for answer in plan.what_if.tiers] == ["camera", "hub"]
    assert plan.what_if.alternatives[0].peak_bytes == plan.full_network.peak_bytes
    assert "SGD without momentum" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines() if not line.startswith("Written"))
    none = command(*CONVNET, "--budgets", "1MB", "--what-if", "--no-verify", "--force")
    assert none.code == 3
    assert "the whole network with" in none.out
    assert "1MB: stage 1 needs" in none.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --budgets"),
        (["--budgets", "1MB", "--tiers", "tiers.toml"], "give either --budgets"),
        (["--budgets", "1MB", "--select", "hub"], "give either --budgets"),
        (["--tiers", "none.toml"], "none.toml"),
        (["--tiers", "tiers.toml", "--select", "phone"], "no tier 'phone'; known are camera, hub"),
        (["--budgets", "1MB", "--rounds-policy", "none"], "--rounds-policy 'none': known are parameters, equal"),
        (["--budgets", "1MB", "--granularity", "stage"], "--granularity 'stage': known are layer, block"),
    ],
)
def test_refusals_are_one_line(command, tiers_file, words, message):
    done = command(*CONVNET, *words)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_network_that_cannot_be_predicted_has_to_be_measured(command):
    detector = ("slt-plan", "fasterrcnn_mobilenet_v3_large_fpn", "--input-shape", "3,96,96", "--batch-size", "2")
    done = command(*detector, "--budgets", "1GB", "--no-verify")
    assert done.code == 2
    assert "the steps of this network can only be measured" in done.err


def test_tiers_that_do_the_same_share_a_column(command):
    done = command(*CONVNET, "--budgets", "34,200,300,400,500MB", "--no-verify", "--no-trade-off")
    assert done.code == 0, done.err
    assert "300MB, 400MB, 500MB: as 200MB, nothing frozen." in done.out
    assert done.out.count("frozen, peak") == 2
