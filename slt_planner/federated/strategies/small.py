"""FedAvg on one small network: the widest that the weakest tier can train end to end."""

from slt_planner.config import Config
from slt_planner.errors import InfeasibleError
from slt_planner.federated.strategies.base import ServerState
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.bench import Bench
from slt_planner.planning.plan import Plan
from slt_planner.planning.search import largest_scale
from slt_planner.units import format_bytes


class SmallNetwork:
    """The whole network at one width, for every tier and all rounds.

    The width is found like a plan's: the largest legal scale whose measured step, with the plan's own step and batch,
    fits the smallest budget of the plan.

    Raises:
        InfeasibleError: not even the narrowest network fits.
    """

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        weakest = min(plan.tiers, key=lambda tier: tier.budget_bytes)
        with Bench(graph, plan.spec) as bench:
            scale = _widest(bench, weakest.budget_bytes)
            floor = format_bytes(bench.peak(bench.space().narrowest(0)))
        if scale is None:
            raise InfeasibleError(
                f"small: the narrowest network needs {floor}, over the {weakest.name} of the weakest tier"
            )
        self._config = Config(freeze_depth=0, full_depth=0, head_scale=scale)

    def tier_configs(self, tier: str) -> tuple[Config, ...]:
        """The one network there is."""
        return (self._config,)

    def stage(self, state: ServerState) -> int:
        """There is one stage."""
        return 0

    def client_config(self, state: ServerState, tier: str) -> Config:
        """Every tier trains the same network."""
        return self._config

    def evaluation_config(self, state: ServerState) -> Config:
        """The one network there is."""
        return self._config


def _widest(bench: Bench, budget: int) -> float | None:
    """The largest scale whose step was measured to fit, the next one being over."""
    space = bench.space()
    while True:
        scale = largest_scale(space, 0, budget)
        wider = next((s for s in space.scales(0) if scale is None or s > scale), None)
        claimed = [space.deepest_frozen(0, s) for s in (scale, wider) if s is not None]
        if not bench.measure_all(claimed):
            return scale
