"""Whether a network can be trained and judged on the data of a run; found out without values."""

from collections.abc import Iterable, Mapping

import torch

from slt_planner.config import Config, Norms
from slt_planner.data.datasets import Dataset
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.step import lone_values_refused
from slt_planner.submodel.extract import SubModel, extract


def check_lone_images(
    graph: ModelGraph, norms: Norms, dataset: Dataset, trained_on_one: Mapping[int, Iterable[Config]]
) -> None:
    """Whether batches of one image, where the data make such, leave batch norms more than one value a channel.

    Args:
        graph: the network's traced structure.
        norms: those of the training step.
        dataset: the images.
        trained_on_one: of each client with one image, what it may train.

    Raises:
        InputError: they do not.
    """
    for client, configs in trained_on_one.items():
        for config in configs:
            with lone_values_refused(f"client {client} has one image", "use --minimum-samples 2"):
                _pass_one(extract(graph, None, config, norms, on_meta=True))
    full = Config.full_network()
    if len(dataset.train_labels) == 1:  # running statistics are of all training images, see evaluate.recalibrate
        with lone_values_refused(f"{dataset.title} has one training image", "give it 2 or more"):
            _pass_one(extract(graph, None, full, "running", on_meta=True))
    if len(dataset.test_labels) == 1:  # a run ends with an evaluation by batch statistics, whatever its norms
        with lone_values_refused(f"{dataset.title} has one test image", "give it 2 or more"):
            _pass_one(extract(graph, None, full, "static", on_meta=True).eval())


def _pass_one(model: SubModel) -> None:
    graph = model.extraction.graph
    with torch.no_grad():
        model(*graph.adapter.inputs(torch.empty(1, *graph.input_shape, device="meta")))
