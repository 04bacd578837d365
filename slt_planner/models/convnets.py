"""Plain convolutional networks of federated papers: the two-convolution ConvNet and VGG-9."""

from torch import nn


def convnet(input_shape: tuple[int, int, int], num_classes: int = 10) -> nn.Sequential:
    """Two 5x5 convolutions (32 and 64 channels, each with 2x2 pooling) and two dense layers, the first with 512 units.

    From McMahan et al. 2017 (arXiv 1602.05629, section 3); 1,663,370 parameters for 1x28x28 images and 10 classes.

    >>> sum(p.numel() for p in convnet((1, 28, 28)).parameters())
    1663370
    """
    channels, height, width = input_shape
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), 512), nn.ReLU()),
        nn.Linear(512, num_classes),
    )


def vgg9(input_shape: tuple[int, int, int], num_classes: int = 10) -> nn.Sequential:
    """Six 3x3 convolutions (32 to 256 channels, pooled after every second) and three dense layers.

    The VGG-9 of federated papers (Wang et al. 2020, arXiv 2002.06440, appendix); 3,491,530 parameters for CIFAR-10.

    >>> sum(p.numel() for p in vgg9((3, 32, 32)).parameters())
    3491530
    """
    incoming, height, width = input_shape
    layers: list[nn.Module] = []
    for pair in ((32, 64), (128, 128), (256, 256)):
        for channels in pair:
            layers += [nn.Conv2d(incoming, channels, 3, padding=1), nn.ReLU()]
            incoming = channels
        layers.append(nn.MaxPool2d(2))
    features = incoming * (height // 8) * (width // 8)
    layers += [nn.Flatten(), nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, num_classes))
