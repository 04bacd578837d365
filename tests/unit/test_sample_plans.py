"""The plans under reports/ are of the networks as they are traced today."""

from pathlib import Path

import pytest

from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.planning.plan import load_plan

PLANS = sorted((Path(__file__).parents[2] / "reports").glob("*/plan.json"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.parent.name)
def test_a_sample_plan_is_of_the_network_that_its_name_builds(path):
    plan = load_plan(path)
    model = load_model(plan.model.name, plan.num_classes, plan.input_shape, weights=False)
    graph = trace(model, plan.input_shape)
    assert graph.hash == plan.model.graph_hash
    assert tuple(unit.name for unit in graph.units) == plan.model.unit_names
