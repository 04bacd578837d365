"""The solver on random small networks, against METHOD's definition over every legal configuration.

The peaks are real: exact predictions of the network's training steps, each asked from `predict` itself.
"""

from itertools import pairwise

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from slt_planner.config import Config, StepSpec, Tier
from slt_planner.errors import InfeasibleError
from slt_planner.graph.trace import trace
from slt_planner.memory.calibrate import calibrate
from slt_planner.memory.predict import predict
from slt_planner.planning.solve import solve

BUDGETS = 8


class Residual(nn.Module):
    """Two convolutions beside an identity or a projection."""

    def __init__(self, channels_in, channels, norm):
        super().__init__()
        self.first = convolution(channels_in, channels, 3, norm)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.beside = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x):
        return torch.relu(self.second(self.first(x)) + self.beside(x))


def convolution(channels_in, channels, kernel, norm):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2),
        nn.BatchNorm2d(channels) if norm else nn.Identity(),
        nn.ReLU(),
    )


@st.composite
def networks(draw, most=3):
    channels, layers = 2, []
    for _ in range(draw(st.integers(1, most))):
        wider, norm = draw(st.integers(1, 5)), draw(st.booleans())
        kind = draw(st.sampled_from(["plain", "plain", "pointwise", "residual", "pooled"]))
        if kind == "residual":
            layers.append(Residual(channels, wider, norm))
        else:
            layers.append(convolution(channels, wider, 1 if kind == "pointwise" else 3, norm))
        if kind == "pooled":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # three of them leave one position
        channels = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


class Brute:
    """METHOD, section 1, word for word, over a network's exact peaks."""

    def __init__(self, graph, spec):
        self.graph = graph
        everything = {
            self.config(f, k, s) for k in range(graph.depth + 1) for s in graph.head_scales(k) for f in range(max(1, k))
        }
        calibrate(graph, list(everything), spec)
        profiles = {config: predict(graph, config, spec, details=False) for config in everything}
        assert all(profile.exact for profile in profiles.values())
        self.peaks = {config: profile.peak_bytes for config, profile in profiles.items()}

    def config(self, freeze, full, scale):
        return Config(freeze_depth=freeze, full_depth=self.graph.depth if scale == 1.0 else full, head_scale=scale)

    def legal(self, config):
        """The same widths under their own name: a head scale between two notches is as wide as the lower."""
        lower = max(s for s in self.graph.head_scales(config.full_depth) if s <= config.head_scale)
        return config.model_copy(update={"head_scale": lower})

    def fits(self, freeze, full, scale, budget):
        return self.peaks[self.legal(self.config(freeze, full, scale))] <= budget

    def schedule(self, budget):
        """(full_depth, head_scale) a stage; None where there is none."""
        if self.fits(0, 0, 1.0, budget):
            return [(self.graph.depth, 1.0)]
        largest = []
        for full in range(self.graph.depth + 1):
            fitting = [s for s in self.graph.head_scales(full) if self.fits(max(0, full - 1), full, s, budget)]
            if not fitting:
                return None
            largest.append(max(fitting))
            if largest[-1] == 1.0 and full:
                break
        stages = [(self.graph.depth, 1.0)]
        for full in reversed(range(len(largest) - 1)):
            cap = stages[0][1]
            allowed = [s for s in self.graph.head_scales(full) if s < cap]
            if largest[full] >= cap:  # a notch or between two, and then as wide as the lower
                allowed.append(cap)
            fitting = [s for s in allowed if self.fits(max(0, full - 1), full, s, budget)]
            if not fitting:
                return None
            stages.insert(0, (full, max(fitting)))
        return stages

    def tier(self, stages, budget):
        """(freeze_depth, full_depth, head_scale) a stage: as little frozen as fits."""
        last = len(stages)
        deepest = [max(0, full - 1) if scale < 1.0 else last - 1 for full, scale in stages]
        return [
            (next((f for f in range(most) if self.fits(f, full, scale, budget)), most), full, scale)
            for (full, scale), most in zip(stages, deepest, strict=True)
        ]

    def plan(self, budgets, policy):
        """Each budget's stages, those of the weakest that has a schedule being shared; None where it has none."""
        plans, shared = {}, None
        for budget in sorted(budgets):
            own = self.schedule(budget) if shared is None or policy == "per-tier" else shared
            if own is not None:
                shared = shared or own
                own = self.tier(own + own[-1:] * (len(shared) - len(own)), budget)
            plans[budget] = own
        return plans


BETWEEN_NOTCHES = (Residual(2, 3, True), convolution(3, 2, 3, False), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@given(networks(), st.sampled_from(["sgd", "adam"]), st.sampled_from(["coupled", "per-tier"]))
@example(nn.Sequential(*BETWEEN_NOTCHES, nn.Linear(2, 3)), "adam", "coupled")  # a later stage's head is no notch here
@settings(max_examples=30, deadline=None)
def test_the_plan_is_the_one_that_brute_force_finds(network, optimizer, policy):
    """With 8 pairs of budgets a network, from below the least need to above the most."""
    graph, spec = trace(network, (2, 6, 6)), StepSpec(batch_size=3, optimizer=optimizer)
    brute = Brute(graph, spec)
    low, high = min(brute.peaks.values()), max(brute.peaks.values())
    for number in range(BUDGETS):
        weak = low + (high - low) * (number - 1) // (BUDGETS - 2)
        budgets = (weak, weak + (high - low) // 5 + 1)
        expected = brute.plan(budgets, policy)
        tiers = [Tier(name=str(budget), budget_bytes=budget, share=0.5) for budget in budgets]
        try:
            plan = solve(graph, tiers, spec, verify=False, policy=policy)
        except InfeasibleError:
            assert set(expected.values()) == {None}
            continue
        for tier in plan.tiers:
            found = [(s.freeze_depth, s.full_depth, s.head_scale) for s in tier.stages] or None
            assert found == expected[tier.budget_bytes]
            assert all(stage.peak_bytes <= tier.budget_bytes for stage in tier.stages)
            assert all(proof.peak_bytes > tier.budget_bytes for proof in tier.proofs)
            assert [s.head_scale for s in tier.stages] == sorted(s.head_scale for s in tier.stages)


@given(networks())
@settings(max_examples=10, deadline=None)
def test_more_memory_never_gives_a_narrower_head(network):
    graph, spec = trace(network, (2, 6, 6)), StepSpec(batch_size=3)
    brute = Brute(graph, spec)
    low, high = min(brute.peaks.values()), max(brute.peaks.values())
    heads = []
    for budget in range(low, high + 1, max(1, (high - low) // 9)):
        try:
            plan = solve(graph, [Tier(name="one", budget_bytes=budget, share=1.0)], spec, verify=False)
        except InfeasibleError:
            heads.append({})
        else:
            heads.append({stage.full_depth: stage.head_scale for stage in plan.stages})
    for less, more in pairwise(heads):
        widest = max(more.values(), default=0.0)
        assert all(more.get(full_depth, widest) >= scale for full_depth, scale in less.items())
