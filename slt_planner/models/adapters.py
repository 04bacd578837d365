"""How torchvision's networks with several outputs are trained: losses as in its own reference scripts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slt_planner.config import Metric
from slt_planner.graph.adapter import Adapter


class AuxiliaryLogits(Adapter):
    """GoogLeNet and Inception: in training a tuple of logits, of which those of auxiliary heads count less."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def scores(self, outputs: Any) -> Any:
        """The first logits of a tuple; the logits alone in evaluation."""
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Cross-entropy, plus that of the auxiliary logits that there are."""
        auxiliary = [x for x in outputs[1:] if x is not None] if isinstance(outputs, tuple) else []
        losses = [F.cross_entropy(x, labels) * self.weight for x in auxiliary]
        return sum(losses, start=F.cross_entropy(self.scores(outputs), labels))


class Segmentation(Adapter):
    """A dict with per-pixel logits (N, classes, H, W) as ``out``, and auxiliary ones as ``aux``; labels are (N, H, W).

    Pixels labelled 255 do not count.
    """

    metric: Metric = "mean_iou"
    loss_is_mean = False  # over pixels that count, of which a micro-batch can have more than its share

    def scores(self, outputs: Any) -> Any:
        """The main logits."""
        return outputs["out"]

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Per-pixel cross-entropy, plus half of the auxiliary head's."""
        loss = F.cross_entropy(outputs["out"], labels, ignore_index=self.ignored)
        auxiliary = outputs.get("aux")
        return loss if auxiliary is None else loss + 0.5 * F.cross_entropy(auxiliary, labels, ignore_index=self.ignored)


class Detection(Adapter):
    """torchvision's detectors, which take a list of images with targets and compute their loss themselves.

    The backbone, with its feature pyramid, is traced and cut; the heads, whose shapes depend on data, stay whole.
    `masks` and `keypoints` say what the targets hold besides boxes and classes.
    """

    loss_is_mean = False  # over proposals, of which an image can have more than another
    part = "backbone"
    _OBJECTS = 4  # made-up objects an image
    _KEYPOINTS = 17  # of a person, as in COCO

    def __init__(self, classes: int, masks: bool = False, keypoints: bool = False) -> None:
        self.classes, self.masks, self.keypoints = classes, masks, keypoints

    def traced_shape(self, model: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """What the backbone sees: detectors resize and pad images first."""
        images, _ = model.transform([torch.zeros(input_shape)])  # type: ignore[operator]
        return tuple(images.tensors.shape[1:])

    def num_classes(self, model: nn.Module) -> int:
        """Background included."""
        return self.classes

    def step_loss(self, model: nn.Module, images: Tensor, labels: Any) -> Tensor:
        """The sum of the losses that the detector computes."""
        losses: dict[str, Tensor] = model(list(images), labels)
        return torch.stack(list(losses.values())).sum()

    def example_labels(self, batch_size: int, num_classes: int, input_shape: tuple[int, ...]) -> Any:
        """Targets with four boxes an image, each half of its height and width."""
        return [self._target(num_classes, *input_shape[-2:]) for _ in range(batch_size)]

    def labels_of(self, labels: Any, chosen: slice) -> Any:
        """The targets of some images."""
        return labels[chosen]

    def _target(self, num_classes: int, height: int, width: int) -> dict[str, Tensor]:
        size = torch.tensor([width, height])
        corner = torch.rand(self._OBJECTS, 2) * size / 2
        boxes = torch.cat([corner, corner + size / 2], dim=1)
        target = {"boxes": boxes, "labels": torch.randint(1, max(2, num_classes), (self._OBJECTS,))}
        if self.masks:
            target["masks"] = torch.randint(2, (self._OBJECTS, height, width), dtype=torch.uint8)
        if self.keypoints:
            inside = corner[:, None] + torch.rand(self._OBJECTS, self._KEYPOINTS, 2) * size / 2
            visible = torch.ones(self._OBJECTS, self._KEYPOINTS, 1)
            target["keypoints"] = torch.cat([inside, visible], dim=2)
        return target
