"""Networks that change in place what their backward pass needs: PyTorch refuses them, so a planner must."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slt_planner.config import Config, StepSpec
from slt_planner.errors import InputError
from slt_planner.graph.trace import trace
from slt_planner.memory.measure import measure
from slt_planner.memory.predict import predict
from slt_planner.planning.solve import solve
from slt_planner.submodel.extract import extract

SPEC = StepSpec(batch_size=4, threads=1)
CONFIGS = [Config.full_network(), Config(freeze_depth=0, full_depth=1, head_scale=0.5)]


class AddsInPlace(nn.Module):
    """ReLU's backward pass looks at what ReLU gave; addition's at nothing."""

    def __init__(self, to_what_relu_gave):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.to_what_relu_gave = to_what_relu_gave

    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.b(x)
        y = F.relu(y).add_(x) if self.to_what_relu_gave else F.relu(y.add_(x))
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("wrong", [True, False])
def test_a_network_is_refused_where_torch_refuses_it(wrong, config):
    network = AddsInPlace(wrong)
    graph = trace(network, (1, 8, 8))

    def plain():
        extract(graph, network, config)(torch.randn(4, 1, 8, 8)).sum().backward()

    for work in (plain, lambda: measure(extract(graph, None, config), SPEC), lambda: predict(graph, config, SPEC)):
        with pytest.raises((RuntimeError, InputError), match=r"in place|inplace") if wrong else nullcontext():
            work()


@pytest.mark.parametrize("levers", ["none", "exact"])
def test_no_plan_is_made_of_it(levers):
    words = "refuses a change in place: .* needed for gradient computation has been modified"
    with pytest.raises(InputError, match=words):
        solve(trace(AddsInPlace(True), (1, 8, 8)), ["1MB"], SPEC, levers=levers)


class OverAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        first, second = self.a(x).chunk(2, 1)
        return self.fc(self.b(first.add_(second)).mean((2, 3)))


def test_other_words_of_torch_are_told_in_a_line_too():
    with pytest.raises(InputError, match=r"refuses a change in place: Output 0 of Split\w* is a view"):
        solve(trace(OverAPart(), (1, 8, 8)), ["1MB"], SPEC)
