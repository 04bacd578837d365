"""The solver on real measured networks, against brute force over every configuration."""

import json
from importlib.resources import files

import pytest
from torch import nn

from slt_planner.config import Config, StepSpec, Tier
from slt_planner.errors import InfeasibleError, InputError
from slt_planner.graph.trace import trace
from slt_planner.memory.measure import measure
from slt_planner.planning.plan import Plan, load_plan
from slt_planner.planning.solve import solve
from slt_planner.submodel.extract import extract

SPEC = StepSpec(batch_size=4)


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


GRAPH = trace(small_network(), (3, 16, 16))
PEAKS: dict[Config, int] = {}


def peak(freeze_depth, full_depth, head_scale):
    full_depth = GRAPH.depth if head_scale == 1.0 else full_depth
    config = Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale)
    if config not in PEAKS:
        PEAKS[config] = measure(extract(GRAPH, None, config), SPEC, details=False).peak_bytes
    return PEAKS[config]


def brute_force(budgets):
    """METHOD's definition over every legal configuration; None where no budget has a schedule."""
    for weakest in sorted(budgets):
        largest = []
        for full_depth in range(GRAPH.depth + 1):
            freeze = max(0, full_depth - 1)
            largest.append(
                max((s for s in GRAPH.head_scales(full_depth) if peak(freeze, full_depth, s) <= weakest), default=0)
            )
            if largest[-1] in (0, 1.0):
                break
        if largest[-1] == 0:
            continue
        if largest[0] == 1.0:
            shared = [(GRAPH.depth, 1.0)]
        else:
            later = [(k, min(largest[k:])) for k in range(1, len(largest))]
            shared = [(0, min(largest[0], later[0][1]))] + [(GRAPH.depth if s == 1.0 else k, s) for k, s in later]
        return {
            budget: [(min(f for f in range(max(1, k)) if peak(f, k, s) <= budget), k, s) for k, s in shared]
            for budget in budgets
            if budget >= weakest
        }
    return None


def test_the_plan_is_the_one_that_brute_force_finds():
    everything = [peak(f, k, s) for k in range(GRAPH.depth + 1) for s in GRAPH.head_scales(k) for f in range(max(1, k))]
    low, high = min(everything), max(everything)
    budgets = [low + (high - low) * i // 12 for i in range(-1, 14)]
    feasible = 0
    for budget in budgets:
        tiers = [budget, budget + (high - low) // 5]
        expected = brute_force(tiers)
        try:
            plan = solve(GRAPH, [Tier(name=str(b), budget_bytes=b, share=0.5) for b in tiers], SPEC)
        except InfeasibleError:
            assert expected is None
            continue
        feasible += 1
        for tier in plan.tiers:
            found = [(s.freeze_depth, s.full_depth, s.head_scale) for s in tier.stages]
            assert found == (expected or {}).get(tier.budget_bytes, []), tier.name
            assert all(stage.measured_peak_bytes <= tier.budget_bytes for stage in tier.stages)
            assert all(proof.measured_peak_bytes > tier.budget_bytes for proof in tier.proofs)
    assert 3 <= feasible < len(budgets)


def test_an_infeasible_tier_says_what_it_lacks_and_the_rest_go_on():
    floor = min(peak(0, 0, s) for s in GRAPH.head_scales(0))
    full = peak(0, 0, 1.0)
    plan = solve(
        GRAPH,
        [Tier(name="tiny", budget_bytes=floor - 1, share=0.5), Tier(name="big", budget_bytes=full, share=0.5)],
        SPEC,
    )
    tiny, big = plan.tiers
    assert (tiny.status, big.status) == ("infeasible", "full")
    assert "the warm-up needs" in tiny.reason
    assert tiny.stages == ()
    assert [(s.full_depth, s.head_scale) for s in plan.stages] == [(GRAPH.depth, 1.0)]
    smallest = tiny.smallest_budget_bytes
    assert brute_force([smallest]) is not None
    assert brute_force([smallest - 1]) is None


def test_no_tier_feasible_is_an_error_that_names_the_smallest_budget():
    with pytest.raises(InfeasibleError, match=r"1kB: the warm-up needs .* the smallest budget with a schedule is"):
        solve(GRAPH, ["1kB"], SPEC)


def test_a_plan_has_the_timeline_of_the_whole_networks_step():
    own = solve(GRAPH, ["10MB"], SPEC).full_network
    assert own.source == "MEASURED"
    assert max(point.live_bytes for point in own.timeline) == own.peak_bytes
    begin = own.timeline[0].live_bytes - own.timeline[0].change_bytes
    assert own.resident is not None
    assert begin == sum(own.resident.values())


def test_plans_survive_saving_and_loading(tmp_path):
    plan = solve(GRAPH, ["10MB"], SPEC, model_name="a name")
    path = tmp_path / "folder" / "plan.json"
    plan.save(path)
    assert load_plan(path) == plan
    with pytest.raises(InputError, match="exists; choose another name, or --force"):
        plan.save(path)
    plan.save(path, force=True)
    assert plan.spec == SPEC.model_copy(update={"threads": plan.step.threads})
    assert sum(stage.rounds_fraction for stage in plan.stages) == pytest.approx(1)
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]  # no temporary file is left


def test_a_plan_that_contradicts_itself_is_refused(tmp_path):
    plan = solve(GRAPH, ["10MB"], SPEC)
    good = plan.model_dump(mode="json")

    def broken(change):
        data = Plan.model_validate(good).model_dump(mode="json")
        change(data)
        return data

    stage = "tiers.0.stages.0"
    cases = [
        (lambda d: d.update(schema_version=2), "schema_version"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d["tiers"].append(d["tiers"][0]), "two tiers have the same name"),
        (lambda d: d["tiers"][0].update(budget_bytes=10**400), "budget_bytes"),
        (lambda d: d.update(input_shape=[3, -1, 32]), "input_shape.1"),
        (lambda d: d["step"]["optimizer"].update(weight_decay=float("inf")), "weight_decay"),
        (lambda d: d["tiers"][0].update(budget_bytes=1), "over the budget"),
        (lambda d: d["tiers"][0]["stages"][0].update(measured_peak_bytes=7), "does not add up"),
        (lambda d: d["tiers"][0]["stages"][0].update(freeze_depth=99), stage),
        (lambda d: d["tiers"][0]["stages"][0].update(head_scale=0.5), "differ from the plan"),
        (lambda d: d["tiers"][0].update(stages=[]), "differ from the plan"),
        (lambda d: d["model"].update(unit_names=["a"]), "beyond unit 1"),
        (lambda d: d["step"].update(micro_batch=99), "micro_batch is larger than batch_size"),
        (lambda d: d.update(stages=[]), "stages"),
    ]
    for number, (change, words) in enumerate(cases):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(broken(change)))
        with pytest.raises(InputError) as caught:
            load_plan(path)
        assert str(path) in str(caught.value)
        assert words in str(caught.value), caught.value


@pytest.mark.parametrize("text", ["[" * 100_000, '{"batch_size": ' + "9" * 5000 + "}", "[]", "7", "", "\xff"])
def test_a_file_that_is_no_plan_at_all(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"plan\.json: ") as caught:
        load_plan(path)
    assert "\n" not in str(caught.value)


def test_the_published_schema_is_that_of_the_records():

    published = json.loads((files("slt_planner.planning") / "plan.schema.json").read_text())
    assert published == Plan.model_json_schema()


def test_what_a_stage_costs_is_what_counting_by_hand_says():
    """Parameters of the cut convolutions, norms and classifier, written out; rounds in proportion to them."""
    floor = max(peak(max(0, k - 1), k, GRAPH.head_scales(k)[0]) for k in range(3))
    plan = solve(GRAPH, [Tier(name="one", budget_bytes=floor + 3000, share=1.0)], SPEC)
    (tier,) = plan.tiers
    counted = []
    for stage in tier.stages:
        f, t, s = stage.freeze_depth, stage.full_depth, stage.head_scale
        a, b, c = (full if unit <= t else max(1, int(s * full + 1e-9)) for unit, full in ((1, 4), (2, 6), (3, 6)))
        units = [3 * a * 9 + 2 * a, a * b * 9 + b, b * c * 9 + c]
        counted.append(sum(units[f:]) + c * 3 + 3)
        assert stage.trainable_parameters == counted[-1]
        assert stage.upload_bytes == 4 * counted[-1]
        assert stage.download_bytes == 4 * (sum(units) + c * 3 + 3)
        assert stage.frozen_bytes == 4 * sum(units[:f])
    assert [stage.rounds_fraction for stage in plan.stages] == pytest.approx([n / sum(counted) for n in counted])
    assert plan.stages[0].limited_by in ("later_stage", "budget")
    assert plan.stages[-1].limited_by == "full"


def test_a_stronger_tier_follows_the_weakest():
    full = peak(0, 0, 1.0)
    plan = solve(
        GRAPH,
        [Tier(name="weak", budget_bytes=full - 1, share=0.5), Tier(name="strong", budget_bytes=2 * full, share=0.5)],
        SPEC,
    )
    weak, strong = plan.tiers
    assert [s.limited_by for s in weak.stages] == [s.limited_by for s in plan.stages]
    assert {s.limited_by for s in strong.stages} <= {"weakest_tier", "full"}
    assert all(stage.freeze_depth == 0 for stage in strong.stages)
    with pytest.raises(InputError, match="each with a name of its own"):
        solve(
            GRAPH,
            [Tier(name="a", budget_bytes=full, share=0.5), Tier(name="a", budget_bytes=2 * full, share=0.5)],
            SPEC,
        )
    with pytest.raises(InputError, match="budgets alone, or tiers alone"):
        solve(GRAPH, ["1MB", Tier(name="a", budget_bytes=full, share=0.5)], SPEC)


def test_the_largest_batch_of_a_step_in_micro_batches_is_looked_for_among_steps_that_exist():
    """Batches down to 2, with micro-batches of 3: the smaller ones run at once."""
    spec = StepSpec(batch_size=6, micro_batch=3, norms="running")
    floor = solve(GRAPH, ["1GB", "1kB"], spec, verify=False).tiers[0].smallest_budget_bytes
    budget = Tier(name="one", budget_bytes=floor - 1, share=1.0)
    with pytest.raises(InfeasibleError, match=r"the largest batch within this one [2-5] "):
        solve(GRAPH, [budget], spec, verify=False)
