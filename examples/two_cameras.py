"""A network of one's own: two inputs, grouped convolutions and a dict of outputs, with its adapter.

slt-plan examples/two_cameras.py:TwoCameras --input-shape 2,16,16 --budgets 5,10MB --batch-size 16
slt-train --plan plan.json --model examples/two_cameras.py:TwoCameras
"""

import torch
import torch.nn.functional as F
from torch import nn

from slt_planner import Adapter


class LeftAndRight(Adapter):
    """A sample of the data holds both cameras as its two channels."""

    def inputs(self, images):
        return images[:, :1], images[:, 1:]

    def scores(self, outputs):
        return outputs["logits"]

    def loss(self, outputs, labels):
        return F.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)


class TwoCameras(nn.Module):
    """Both images go through the same layers, then are compared."""

    slt_adapter = LeftAndRight()

    def __init__(self, num_classes=10):
        super().__init__()
        self.eye = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=8), nn.GroupNorm(8, 64), nn.ReLU()),
        )
        self.both = nn.Sequential(nn.Conv2d(128, 64, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def forward(self, left, right):
        features = self.both(torch.cat([self.eye(left), self.eye(right)], dim=1)).mean((2, 3))
        return {"features": features, "logits": self.head(features)}
