"""Attention: whole heads; a block at the boundary projects from the wide stream."""

from torch import fx, nn

from slt_planner.graph.region import Dimension, common
from slt_planner.graph.rules.arithmetic import broadcast
from slt_planner.graph.wide_attention import WideAttention
from slt_planner.graph.widths import Cut, Index, Operator, rule


@rule(nn.MultiheadAttention, weighted=True)
def _multihead_attention(op: Operator) -> Cut:
    """The first heads; their queries, keys and values take all channels that come (METHOD, section 1, Widths)."""
    module = op.module
    if module.bias_k is not None or module.add_zero_attn or not module._qkv_same_embed_dim:
        raise op.refused("with bias_k, add_zero_attn, kdim or vdim has no width rule")
    sources = [op.argument(i, name) for i, name in enumerate(("query", "key", "value"))]
    regions = [op.region(source) for source in sources]
    stream = common([region[-1] for region in regions])
    given = op.keep(module.embed_dim)
    for dimension in (*[region[-1] for region in regions], given):
        op.needs.steps(dimension, module.head_dim)
        if module.num_heads == 1:  # a step is no smaller than all of it
            op.needs.whole(dimension)
    heads = given.width // module.head_dim
    rows = Dimension(3 * module.embed_dim)
    if heads < module.num_heads:
        rows = rows.keeping(tuple(part * module.embed_dim + i for part in range(3) for i in given.indices))
    parameters: dict[str, Index] = {"in_proj_weight": (rows, stream), "out_proj.weight": (given, given)}
    if module.in_proj_bias is not None:
        parameters |= {"in_proj_bias": (rows,), "out_proj.bias": (given,)}
    attributes = {
        **dict.fromkeys(("embed_dim", "kdim", "vdim", "out_proj.in_features", "out_proj.out_features"), given.width),
        "num_heads": heads,
    }
    inputs = {
        source: (*region[:-1], region[-1].keeping(stream.indices))
        for source, region in zip(sources, regions, strict=True)
        if region[-1].indices != stream.indices
    }
    output = (*op.output[0][:-1], given)
    results = (output, *op.output[1:]) if len(op.output) > 1 else (output,)
    wide = stream.width != given.width
    return Cut(results, inputs, parameters, attributes, replacement=_widened if wide else None)


def _widened(cut: nn.Module) -> nn.Module:
    assert isinstance(cut, nn.MultiheadAttention)
    return WideAttention(cut)


@rule("scaled_dot_product_attention")
def _dot_product_attention(op: Operator) -> Cut:
    """(..., heads, positions, head width): the same heads of all three; the width of a head is never cut."""
    query, key, value = (op.argument(i, name) for i, name in enumerate(("query", "key", "value")))
    q, k, v = op.region(query), op.region(key), op.region(value)
    for dimension in (q[-1], k[-1]):
        op.needs.whole(dimension)
    if not (q[-1].whole and k[-1].whole and q[-2].whole and k[-2].whole and v[-2].whole):
        raise op.refused("over a cut width of a head has no width rule")
    heads = op.output[:-2]
    batch, taken = broadcast(heads, {query: q[:-2], key: k[:-2], value: v[:-2]})
    inputs = {node: (*part, *op.regions[node][-2:]) for node, part in taken.items()}
    mask = op.argument(3, "attn_mask")
    if isinstance(mask, fx.Node):
        region = op.region(mask)
        _, cut = broadcast((*batch, *op.output[-2:]), {mask: region})
        inputs |= cut
    return Cut((*batch, q[-2], v[-1]), inputs)
