"""The authors' schedules, brought to legal scales."""

import pytest

from benchmarks.authors_schedules import SCHEDULES, least_frozen, their_configs
from slt_planner.config import Config
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model

GRAPH = trace(load_model("resnet20", weights=False), (3, 32, 32))


def test_scales_are_those_worked_out_by_hand():
    _, steps = SCHEDULES["0.125, searched"]
    configs = their_configs(GRAPH, steps)
    assert [config.full_depth for config in configs] == list(range(17))
    assert [config.freeze_depth for config in configs] == [0, *range(16)]
    channels = [3, 3, 3, 3, 4, 4, 5, 5, 11, 11, 21, 21, 30, 33, 49, 54, 64]
    assert [config.head_scale * 64 for config in configs] == channels


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_convolution_has_the_channels_of_their_rule(name):
    assert their_configs(GRAPH, SCHEDULES[name][1])[-1].head_scale == 1.0  # and raises nothing


@pytest.mark.parametrize(("budget", "freeze_depth"), [(100, 5), (106, 2), (200, 0)])
def test_freezing_less_as_long_as_it_fits(budget, freeze_depth):
    start = Config(freeze_depth=5, full_depth=6, head_scale=0.5)

    def peak(config):
        return 100 + 2 * (5 - config.freeze_depth)

    assert least_frozen(start, budget, peak).freeze_depth == freeze_depth
