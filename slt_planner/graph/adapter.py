"""Between the data and a network: what it is fed, which of its outputs counts, and what it minimises."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slt_planner.config import Metric
from slt_planner.errors import InputError


class Adapter:
    """How a batch of images (N, ...) and labels meets a network; subclass it and override what differs.

    This one is for networks that take images and give logits (N, classes). A network that needs another one names it
    as its attribute ``slt_adapter``, or it is given to `trace`.

    >>> class TwoViews(Adapter):
    ...     def inputs(self, images):
    ...         return images, images.flip(-1)
    ...     def scores(self, outputs):
    ...         return outputs["logits"]
    """

    metric: Metric = "accuracy"
    """How the network is judged: ``accuracy``, or ``mean_iou`` over the pixels of (N, classes, H, W) scores."""

    loss_is_mean = True
    """The loss is a mean over the samples of a batch, so that micro-batches give the same gradients."""

    part = ""
    """The fqn of the module that is traced, where shapes in the rest of the network depend on data; "" is all of it."""

    def traced_shape(self, model: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """What `inputs` is given when the network (or its traced part) is traced, without the batch."""
        return input_shape

    def num_classes(self, model: nn.Module) -> int | None:
        """How many classes the network tells apart; None where dimension 1 of its scores says it."""
        return None

    def inputs(self, images: Tensor) -> tuple[Any, ...]:
        """The network's arguments; tensors whose first dimension is the batch."""
        return (images,)

    def scores(self, outputs: Any) -> Any:
        """The output that is judged: logits of shape (N, classes). All others are auxiliary; they may be dropped."""
        return outputs

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """What a training step minimises; by default the scores' cross-entropy. An output that was dropped is None.

        Where pixels are judged those labelled 255 do not count.
        """
        return F.cross_entropy(self.scores(outputs), labels, ignore_index=self.ignored)

    @property
    def ignored(self) -> int:
        """The label of pixels that do not count; of images all do."""
        return 255 if self.metric == "mean_iou" else -100

    def labels_of(self, labels: Any, chosen: slice) -> Any:
        """The labels of some samples of a batch; they are tensors whose first dimension is the batch."""
        return pytree.tree_map(lambda own: own[chosen], labels)

    def step_loss(self, model: nn.Module, images: Tensor, labels: Any) -> Tensor:
        """The loss of a batch; override it only where the network computes its loss itself.

        Raises:
            InputError: `loss` does not bear that an output was dropped.
        """
        outputs = model(*self.inputs(images))
        try:
            return self.loss(outputs, labels)
        except (AttributeError, TypeError) as error:
            if all(leaf is not None for leaf in pytree.tree_leaves(outputs)):
                raise
            raise InputError(
                f"{type(self).__name__}.loss: {error}; an output that is not in a sub-model is None"
            ) from error

    def example_labels(self, batch_size: int, num_classes: int, input_shape: tuple[int, ...]) -> Any:
        """Made-up labels for measuring a step: class numbers (N,), or where pixels are judged (N, H, W)."""
        return torch.randint(num_classes, (batch_size, *(input_shape[-2:] if self.metric == "mean_iou" else ())))
