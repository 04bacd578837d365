"""How good the global model is: accuracy with batch statistics, and with recalibrated running statistics."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn

from slt_planner.config import Config, StepSettings
from slt_planner.data.datasets import Dataset, normalise
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.step import memory_format
from slt_planner.submodel.extract import SubModel, extract
from slt_planner.submodel.merge import merge

BATCH = 1024
SERVER_IMAGES = 1024


def evaluate(model: SubModel, dataset: Dataset, step: StepSettings, seed: int) -> tuple[float, float]:
    """Accuracy and mean loss on the test images, shuffled by `seed`, in batches of 1,024 without a tail of one.

    With `static` norms each batch is normalised by its own statistics, hence the shuffle and the large batch.
    """
    model.to(memory_format=memory_format(step)).eval()
    order = torch.randperm(len(dataset.test_labels), generator=torch.Generator().manual_seed(seed))
    correct, loss = 0, 0.0
    with torch.inference_mode():
        for chosen in split_without_tail(order, BATCH):
            batch = normalise(dataset.test_images[chosen], dataset).to(memory_format=memory_format(step))
            labels = dataset.test_labels[chosen]
            logits = model(batch)
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return correct / len(order), loss / len(order)


def split_without_tail(order: Tensor, size: int) -> Iterator[Tensor]:
    """Consecutive pieces of `size`; a last piece of one element joins the piece before it."""
    pieces = list(order.split(size))
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    yield from pieces


def recalibrate(
    graph: ModelGraph, weights: Mapping[str, Tensor], config: Config, dataset: Dataset, seed: int
) -> dict[str, Tensor]:
    """The same weights with running statistics of the network that `config` cuts, so that it can classify one image.

    They are averaged over up to 1,024 training images, drawn by `seed` and used without labels, that stand for images
    the server holds.
    """
    config = config.model_copy(update={"freeze_depth": 0})  # the statistics of frozen norms are wanted too
    model = extract(graph, weights, config, norms="running")
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(seed))
    pieces = split_without_tail(order[:SERVER_IMAGES], BATCH // 4)
    update_bn((normalise(dataset.train_images[chosen], dataset) for chosen in pieces), model)
    return merge(graph, weights, [(config, model.trained_state(), 1)])
