"""Successive Layer Training (arXiv 2305.17005): every tier follows its stages of the plan."""

from bisect import bisect_right
from itertools import accumulate

from slt_planner.config import Config
from slt_planner.federated.strategies.base import ClientStep, ServerState
from slt_planner.planning.plan import Plan
from slt_planner.planning.rounds import deal_rounds


class SuccessiveLayerTraining:
    """The plan's schedule over a number of rounds.

    Raises:
        InputError: fewer rounds than stages.
    """

    keeps_budgets = True

    def __init__(self, plan: Plan, rounds: int) -> None:
        self._stages = {
            tier.name: tuple(ClientStep(stage.config, stage.levers) for stage in tier.stages) for tier in plan.tiers
        }
        self._stages_taking_part = [self._stages[tier.name] for tier in plan.feasible_tiers]
        self._last_rounds = list(accumulate(deal_rounds(rounds, [s.rounds_fraction for s in plan.stages])))

    def tier_steps(self, tier: str) -> tuple[ClientStep, ...]:
        """The tier's stages; none for an infeasible tier, and for one without clients."""
        return self._stages.get(tier, ())

    def stage(self, state: ServerState) -> int:
        """The stage that the next round belongs to: the planned one, or a later one if plateaus ended stages sooner."""
        planned = bisect_right(self._last_rounds, state.round)
        return min(max(planned, state.progress.plateau.stage), len(self._last_rounds) - 1)

    def tier_step(self, state: ServerState, tier: str) -> ClientStep:
        """The tier's configuration in this stage, with its levers."""
        return self._stages[tier][self.stage(state)]

    def client_step(self, state: ServerState, tier: str, client: int) -> ClientStep:
        """What all clients of the tier train in this stage."""
        return self.tier_step(state, tier)

    def evaluation_config(self, state: ServerState) -> Config:
        """The widest that is trained in this stage; where tiers share a head scale it is the same for all."""
        stage = self.stage(state)
        return max((steps[stage].config for steps in self._stages_taking_part), key=lambda config: config.head_scale)
