"""How good the global model is: with batch statistics, and with recalibrated running statistics."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from slt_planner.config import Config, Metric
from slt_planner.data.datasets import Dataset, normalise
from slt_planner.graph.trace import ModelGraph
from slt_planner.submodel.extract import SubModel, extract
from slt_planner.submodel.merge import merge

BATCH = 256  # of 32x32; activations of larger ones are given back to the system and come as new pages every time
SERVER_IMAGES = 1024
_BATCH_PIXELS = BATCH * 32 * 32  # larger images go in smaller batches, so that evaluating needs no more memory
_FEWEST = 16
_NARROW = 8  # channels; convolutions of fewer are slower with channels last, those of more faster


def evaluate(model: SubModel, dataset: Dataset, seed: int) -> tuple[float, float]:
    """The metric of the network's adapter and the mean loss on the test images, as `confusion_and_loss` runs them."""
    confusion, loss = confusion_and_loss(model, dataset, seed)
    return quality(confusion, model.extraction.graph.adapter.metric), loss


def confusion_and_loss(model: SubModel, dataset: Dataset, seed: int) -> tuple[Tensor, float]:
    """How often each class was given (rows) and predicted (columns), and the mean loss; test images shuffled by `seed`.

    Batches are of 256 images (of as many pixels as 256 of 32x32, where images are larger), without a tail of one:
    with `static` norms each batch is normalised by its own statistics.
    """
    adapter, device = model.extraction.graph.adapter, next(model.parameters()).device
    layout = evaluation_format(model)
    model.to(memory_format=layout).eval()
    order = torch.randperm(len(dataset.test_labels), generator=torch.Generator().manual_seed(seed))
    confusion, loss = torch.zeros(dataset.num_classes, dataset.num_classes, dtype=torch.int64), 0.0
    with torch.inference_mode():
        for chosen in split_without_tail(order, _batch_size(dataset)):
            batch = normalise(dataset.test_images[chosen].to(device), dataset).to(memory_format=layout)
            labels = dataset.test_labels[chosen].long().to(device)
            outputs = model(*adapter.inputs(batch))
            loss += float(adapter.loss(outputs, labels)) * len(chosen)
            confusion += _confusion(adapter.scores(outputs).argmax(1), labels, dataset.num_classes).cpu()
    return confusion, loss / len(order)


def evaluation_format(model: nn.Module) -> torch.memory_format:
    """The memory format in which a network's forward pass is the faster one on a CPU."""
    narrowest = min((own.shape[0] for own in model.parameters() if own.ndim == 4), default=0)
    return torch.channels_last if narrowest >= _NARROW else torch.contiguous_format


def quality(confusion: Tensor, metric: Metric) -> float:
    """The metric of (given, predicted) counts.

    >>> quality(torch.tensor([[3, 1], [0, 4]]), "accuracy")
    0.875
    """
    if metric == "mean_iou":
        return mean_iou(confusion)
    return int(confusion.diag().sum()) / int(confusion.sum())


def _confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How often each class was given (rows) and predicted (columns)."""
    counted = labels < num_classes  # 255 marks pixels that do not count
    pairs = labels[counted] * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(confusion: Tensor) -> float:
    """Intersection over union, averaged over the classes that were given or predicted, from (given, predicted) counts.

    >>> mean_iou(torch.tensor([[3, 1], [0, 4]]))
    0.775
    """
    hit = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - hit
    return float((hit[union > 0] / union[union > 0]).mean())


def _batch_size(dataset: Dataset) -> int:
    height, width = dataset.test_images.shape[-2:]
    return min(BATCH, max(_FEWEST, _BATCH_PIXELS // (height * width)))


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
    the server holds. Only norms are in training mode: dropout and the like are off, as when an image is classified.
    """
    config = config.model_copy(update={"freeze_depth": 0})  # the statistics of frozen norms are wanted too
    model = extract(graph, weights, config, norms="running")
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(seed))
    norms = [
        module for module in model.eval().modules() if isinstance(module, _NormBase) and module.track_running_stats
    ]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    with torch.inference_mode():
        for number, chosen in enumerate(split_without_tail(order[:SERVER_IMAGES], _batch_size(dataset)), start=1):
            for norm in norms:
                norm.momentum = 1 / number  # the mean over the batches so far
            model(*graph.adapter.inputs(normalise(dataset.train_images[chosen], dataset)))
    return merge(graph, weights, [(config, model.trained_state(), 1)])
