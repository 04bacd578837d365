"""What names of networks say, without torch."""


def is_reference(name: str) -> bool:
    """Whether a name stands for the user's own code, which is run to build the network.

    >>> [is_reference(name) for name in ("resnet20", "timm:resnet18", "./file.py:Class", "package.module:factory")]
    [False, False, True, True]
    """
    return ":" in name and not name.startswith("timm:")
