"""Whether a network can be trained and judged on the data of a run; found out without values."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from slt_planner.config import Config, Norms
from slt_planner.data.datasets import Dataset
from slt_planner.errors import InputError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.step import lone_values_refused
from slt_planner.submodel.extract import SubModel, extract


def check_labels(graph: ModelGraph, dataset: Dataset) -> None:
    """Whether labels are of what the network gives scores for: of an image, or of each of its pixels.

    An adapter's loss may take other labels, but a run is judged by the class of the highest score.

    Raises:
        InputError: they are not.
    """
    model = extract(graph, None, Config.full_network(), "static", on_meta=True).eval()
    scores = tuple(graph.adapter.scores(_outputs(model, images=2)).shape)
    labels = (2, *dataset.train_labels.shape[1:])
    if (scores[0], *scores[2:]) != labels:
        raise InputError(
            f"{dataset.title}: of 2 images the labels are {labels}, and the network's scores {scores}; classes of "
            "images go with scores (N, classes), those of pixels (masks:DIR) with scores (N, classes, H, W)"
        )


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
                _outputs(extract(graph, None, config, norms, on_meta=True), images=1)
    full = Config.full_network()
    if len(dataset.train_labels) == 1:  # running statistics are of all training images, see evaluate.recalibrate
        with lone_values_refused(f"{dataset.title} has one training image", "give it 2 or more"):
            _outputs(extract(graph, None, full, "running", on_meta=True), images=1)
    if len(dataset.test_labels) == 1:  # a run ends with an evaluation by batch statistics, whatever its norms
        with lone_values_refused(f"{dataset.title} has one test image", "give it 2 or more"):
            _outputs(extract(graph, None, full, "static", on_meta=True).eval(), images=1)


def _outputs(model: SubModel, images: int) -> Any:
    """What a sub-model without values gives for so many images: shapes."""
    graph = model.extraction.graph
    with torch.no_grad():
        return model(*graph.adapter.inputs(torch.empty(images, *graph.input_shape, device="meta")))
