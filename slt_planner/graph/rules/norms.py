"""Norms follow the channels that come; groups of channels stay whole."""

from torch import fx, nn

from slt_planner.graph.region import Dimension, Region, cut_to, is_whole
from slt_planner.graph.widths import Cut, Index, Operator, rule

_CHANNEL_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def _whole_positions(op: Operator, region: Region) -> Region:
    if not is_whole(region[2:]):
        raise op.refused("over a dimension that a head scale cuts has no width rule")
    return region


def _module_tensors(module: nn.Module, index: Index) -> dict[str, Index]:
    return {name: index for name in _TENSORS if getattr(module, name, None) is not None}


@rule(*_CHANNEL_NORMS)
def _channel_norm(op: Operator) -> Cut:
    region = _whole_positions(op, op.region(op.argument(0, "input")))
    channels = region[1]
    return Cut(region, {}, _module_tensors(op.module, (channels,)), {"num_features": channels.width})


@rule("batch_norm", "instance_norm")
def _channel_norm_function(op: Operator) -> Cut:
    x = op.argument(0, "input")
    region = _whole_positions(op, op.region(x))
    return Cut(region, {node: cut_to(r, (region[1],)) for node, r in op.tensors.items() if node is not x})


@rule(nn.GroupNorm)
def _group_norm(op: Operator) -> Cut:
    region = _whole_positions(op, op.region(op.argument(0, "input")))
    groups = _whole_groups(op, region[1], op.module.num_groups)
    sizes = {"num_channels": region[1].width, "num_groups": groups}
    return Cut(region, {}, _module_tensors(op.module, (region[1],)), sizes)


@rule("group_norm")
def _group_norm_function(op: Operator) -> Cut:
    x = op.argument(0, "input")
    region = _whole_positions(op, op.region(x))
    groups = _whole_groups(op, region[1], op.argument(1, "num_groups"))
    taken = {node: cut_to(r, (region[1],)) for node, r in op.tensors.items() if node is not x}
    return Cut(region, taken, arguments={1 if len(op.node.args) > 1 else "num_groups": groups})


def _whole_groups(op: Operator, channels: Dimension, groups: int) -> int:
    if groups == 1:
        return 1  # one group is all that comes
    each = channels.size // groups
    op.needs.steps(channels, each)
    present = {i // each for i in channels.indices}
    if len(present) * each != channels.width:
        raise op.refused(f"with groups of {each} channels meets parts of groups")
    return len(present)


@rule(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(op: Operator) -> Cut:
    region = op.region(op.argument(0, "input"))
    normalised = region[-len(op.module.normalized_shape) :]
    shape = tuple(d.width for d in normalised)
    return Cut(region, {}, _module_tensors(op.module, normalised), {"normalized_shape": shape})


@rule("layer_norm", "rms_norm")
def _layer_norm_function(op: Operator) -> Cut:
    x = op.argument(0, "input")
    region = op.region(x)
    normalised = region[-len(op.argument(1, "normalized_shape")) :]
    taken = {node: cut_to(r, normalised) for node, r in op.tensors.items() if node is not x}
    shape = tuple(d.width for d in normalised)
    return Cut(region, taken, arguments={1 if len(op.node.args) > 1 else "normalized_shape": shape})


@rule(nn.LocalResponseNorm, "local_response_norm")
def _response_norm(op: Operator) -> Cut:
    return Cut(op.region(op.argument(0, "input")))


@rule(nn.PReLU)
def _prelu(op: Operator) -> Cut:
    region = op.region(op.argument(0, "input"))
    if op.module.num_parameters == 1:
        return Cut(region)
    return Cut(region, {}, {"weight": (region[1],)}, {"num_parameters": region[1].width})


@rule("prelu")
def _prelu_function(op: Operator) -> Cut:
    x, weight = op.argument(0, "input"), op.argument(1, "weight")
    region, slopes = op.region(x), op.region(weight)
    if slopes[0].size == 1 or not isinstance(weight, fx.Node):
        return Cut(region)
    return Cut(region, {weight: cut_to(slopes, (region[1],))})
