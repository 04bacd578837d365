"""FedAvg on one small network: the widest that the weakest tier can train end to end."""

from slt_planner.config import Config
from slt_planner.errors import InfeasibleError
from slt_planner.federated.strategies.base import ClientStep, ServerState
from slt_planner.graph.trace import ModelGraph
from slt_planner.planning.bench import Bench
from slt_planner.planning.plan import Plan
from slt_planner.planning.search import largest_scale
from slt_planner.units import format_bytes


class SmallNetwork:
    """The whole network at one width, for every tier and all rounds.

    The width is found like a plan's: the largest legal scale whose measured step, with the plan's own step, batch and
    sets of levers, fits the smallest budget of the plan.

    Raises:
        InfeasibleError: not even the narrowest network fits.
    """

    def __init__(self, plan: Plan, graph: ModelGraph) -> None:
        weakest = min(plan.tiers, key=lambda tier: tier.budget_bytes)
        with Bench(graph, plan.spec, lever_sets=plan.lever_sets) as bench:
            config = _widest(bench, weakest.budget_bytes)
            if config is None:
                floor = format_bytes(bench.peak(bench.space().narrowest(0)))
                raise InfeasibleError(
                    f"small: the narrowest network needs {floor}, over the {weakest.name} of the weakest tier"
                )
            levers = bench.cheapest(config, weakest.budget_bytes)
        # Where nothing is scaled full_depth is immaterial; a network trained end to end is written (0, 0, s).
        self._step = ClientStep(config.model_copy(update={"full_depth": 0}), levers or ())

    def tier_steps(self, tier: str) -> tuple[ClientStep, ...]:
        """The one network there is."""
        return (self._step,)

    def stage(self, state: ServerState) -> int:
        """There is one stage."""
        return 0

    def tier_step(self, state: ServerState, tier: str) -> ClientStep:
        """Every tier trains the same network."""
        return self._step

    def client_step(self, state: ServerState, tier: str, client: int) -> ClientStep:
        """Every client trains the same network."""
        return self._step

    def evaluation_config(self, state: ServerState) -> Config:
        """The one network there is."""
        return self._step.config


def _widest(bench: Bench, budget: int) -> Config | None:
    """The widest network whose step was measured to fit, the next one being over."""
    space = bench.space()
    while True:
        scale = largest_scale(space, 0, budget)
        wider = next((s for s in space.scales(0) if scale is None or s > scale), None)
        within = [] if scale is None else [(space.deepest_frozen(0, scale), budget)]
        over = [] if wider is None else [space.deepest_frozen(0, wider)]
        if not bench.measure_all(within, over):
            return None if scale is None else space.deepest_frozen(0, scale)
