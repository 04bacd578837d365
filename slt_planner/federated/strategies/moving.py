"""Methods whose sub-models move through the network: the width is the tier's, the channels change."""

from collections.abc import Mapping
from dataclasses import replace

from slt_planner.config import Channels, Config
from slt_planner.federated.strategies.base import ClientStep, OneStepATier, ServerState


class MovingChannels(OneStepATier):
    """Every tier trains as wide a network as fits it, of channels that differ by round or client.

    All of the network is trained sooner or later, so it is judged at full width. `like` are channels of the method's
    kind, to measure.
    """

    def __init__(self, steps: Mapping[str, ClientStep], like: Channels) -> None:
        super().__init__({tier: _with_channels(step, like) for tier, step in steps.items()})

    def channels(self, state: ServerState, client: int) -> Channels:
        """Which channels a client trains in the next round."""
        raise NotImplementedError

    def client_step(self, state: ServerState, tier: str, client: int) -> ClientStep:
        """The tier's width, with the client's channels of the round."""
        return _with_channels(self.tier_step(state, tier), self.channels(state, client))

    def evaluation_config(self, state: ServerState) -> Config:
        """The whole network."""
        return Config.full_network()


def _with_channels(step: ClientStep, channels: Channels) -> ClientStep:
    return replace(step, config=step.config.model_copy(update={"channels": channels}))
