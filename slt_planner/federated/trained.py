"""What a run has trained, ready to be used."""

from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slt_planner.config import Config
from slt_planner.errors import InputError
from slt_planner.federated.run_folder import WEIGHTS, load_run
from slt_planner.planning.network import planned_network
from slt_planner.submodel.extract import SubModel, extract


class TrainedNetwork(nn.Module):
    """The sub-model that a run trained last, in evaluation mode, with the normalisation of the images before it."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: SubModel, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), pixels in 0..1, to scores (N, classes), or (N, classes, H, W) of pixels."""
        adapter = self.network.extraction.graph.adapter
        scores: Tensor = adapter.scores(self.network(*adapter.inputs((images - self.mean) / self.std)))
        return scores


def load_trained(folder: str | Path, model: nn.Module | str | None = None) -> TrainedNetwork:
    """The network that a run trained, with running statistics, so that it can classify a single image.

    Args:
        folder: the run folder, of a run that ended.
        model: the network, where the plan's is not one of a library.

    Raises:
        InputError: not a run folder, no weights in it, or another network.

    >>> load_trained("run")(images).argmax(1)  # doctest: +SKIP
    tensor([3])
    """
    result = load_run(folder)
    if result.mean is None or result.std is None:
        raise InputError(f"run {folder}: made by an older version, which did not keep how images were normalised")
    _, graph = planned_network(result.plan, model)
    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            config = Config.model_validate_json((file.metadata() or {}).get("config", ""))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValidationError) as error:
        raise InputError(f"run {folder}: {WEIGHTS} cannot be read; it is there when a run has ended") from error
    network = extract(graph, weights, config, norms="running")
    return TrainedNetwork(network, result.mean, result.std).eval()
