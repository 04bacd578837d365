"""What works on every entry alone, what combines tensors entry by entry, products of matrices, and reductions."""

from dataclasses import replace
from typing import Any

from torch import fx, nn

from slt_planner.graph.region import Dimension, Region, common
from slt_planner.graph.widths import Cut, Operator, rule

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Identity),
    *(nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Softmax, nn.LogSoftmax),
)


@rule(*_ACTIVATIONS)
@rule("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "hardswish")
@rule("hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "softmax", "log_softmax", "normalize")
@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
@rule(
    "exp", "log", "log1p", "sqrt", "rsqrt", "abs", "neg", "square", "reciprocal", "sin", "cos", "erf", "clamp", "clip"
)
@rule("clamp_min", "clamp_max", "threshold", "hardshrink", "softshrink", "tanhshrink")
@rule(
    "clone",
    "contiguous",
    "float",
    "long",
    "int",
    "bool",
    "to",
    "type_as",
    "detach",
    "zero",
    "fill",
    "bernoulli",
    "zeros_like",
)
@rule("ones_like", "rand_like", "randn_like", "empty_like", "sign", "floor", "round", "nan_to_num", "data")
@rule("where", "masked_fill", "maximum", "minimum", "pow", "lerp", "addcmul")
@rule("add", "sub", "rsub", "mul", "multiply", "div", "divide", "truediv", "true_divide")
@rule("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "invert", "logical_and", "logical_or", "logical_not")
def entry_by_entry(op: Operator) -> Cut:
    """Tensors of the same entries (or broadcast): the wide ones are cut to what the narrowest keeps."""
    tensors = op.tensors
    if op.name in ("to", "type_as"):  # another tensor says the type alone
        tensors = {node: region for node, region in tensors.items() if node is op.argument(0, "input")}
    output, taken = broadcast(op.output, tensors)
    if op.name in ("softmax", "log_softmax"):
        op.needs.factor(next(iter(tensors.values()))[_softmax_dimension(op)])
    _fix_what_meets_positions(op, output)
    return Cut(output, taken)


def _softmax_dimension(op: Operator) -> int:
    dim = op.module.dim if op.module is not None else op.argument(1, "dim", -1)
    return -1 if dim is None else int(dim)


def _fix_what_meets_positions(op: Operator, output: Region) -> None:
    """Outputs of weights that are added to positions (of a mixer, say) are positions too, and not scaled."""
    computed = [region for node, region in op.tensors.items() if node.meta["data"]]
    for i in range(1, len(output) + 1):
        meeting = [region[-i] for region in computed if len(region) >= i and region[-i].size == output[-i].size > 1]
        if any(d.axis is None for d in meeting):
            for dimension in meeting:
                op.needs.whole(dimension)


def broadcast(output: Region, tensors: dict[fx.Node, Region]) -> tuple[Region, dict[fx.Node, Region]]:
    """What several broadcast tensors have in common, and what is taken of those that have more."""
    rank = len(output)
    result: list[Dimension] = []
    for i, full in enumerate(output):
        meeting = [r[len(r) - rank + i] for r in tensors.values() if len(r) >= rank - i]
        meeting = [d for d in meeting if d.size == full.size]
        result.append(replace(common(meeting), batched=full.batched) if meeting else full)
    taken = {}
    for node, region in tensors.items():
        aligned = result[rank - len(region) :]
        wanted = tuple(
            d if d.size != shared.size or d.indices == shared.indices else d.keeping(shared.indices)
            for d, shared in zip(region, aligned, strict=True)
        )
        if wanted != region:
            taken[node] = wanted
    return tuple(result), taken


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "std",
    "var",
    "norm",
    "logsumexp",
    "all",
    "any",
    "prod",
)
@rule("var_mean", "std_mean")
def _reduction(op: Operator) -> Cut:
    """Reduced dimensions go (or become 1); a second tensor instead of dimensions makes it an operator of entries."""
    region = op.region(op.argument(0, "input"))
    if len(op.tensors) > 1 or isinstance(op.argument(1, "other"), fx.Node):
        return entry_by_entry(op)
    dims: Any = op.argument(2 if op.name == "norm" else 1, "dim")
    reduced = set(range(len(region))) if dims is None else {d % len(region) for d in as_tuple(dims)}
    for i in reduced:
        op.needs.factor(region[i])
    results = op.output if op.output and isinstance(op.output[0], tuple) else (op.output,)
    keepdim = len(results[0]) == len(region)
    kept = tuple(Dimension(1) if i in reduced else d for i, d in enumerate(region) if keepdim or i not in reduced)
    return Cut((kept,) * len(results) if results is op.output else kept)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Several dimensions, however they were given."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _has_stored_factor(op: Operator) -> bool:
    right = op.argument(1, "other", op.node.kwargs.get("mat2"))
    return isinstance(right, fx.Node) and not right.meta["data"] and len(right.meta["dims"]) == 2


@rule("matmul", "bmm", "mm", weighted=_has_stored_factor)
def _matrix_product(op: Operator) -> Cut:
    """Rows and columns come through; what is summed over must be the same entries on both sides.

    A stored matrix on the right is a linear layer's weight; of two computed factors what is summed over is the width
    of a head.
    """
    left, right = op.argument(0, "input"), op.argument(1, "other", op.node.kwargs.get("mat2"))
    a, b = op.region(left), op.region(right)
    if min(len(a), len(b)) < 2:
        raise op.refused("with a vector has no width rule")
    columns = b[-1]
    if _has_stored_factor(op):
        columns = op.keep(columns.size)
    else:
        op.needs.whole(a[-1])
        op.needs.whole(b[-2])
    inner = common([a[-1], b[-2]])
    batch, taken = broadcast(op.output[:-2], {left: a[:-2], right: b[:-2]})
    wanted = {
        left: (*taken.get(left, a[:-2]), a[-2], a[-1].keeping(inner.indices)),
        right: (*taken.get(right, b[:-2]), b[-2].keeping(inner.indices), b[-1].keeping(columns.indices)),
    }
    return Cut((*batch, a[-2], columns), {n: r for n, r in wanted.items() if r != op.regions[n]})


@rule("einsum")
def _einsum(op: Operator) -> Cut:
    """A letter is a dimension: everywhere it stands, the same entries are taken."""
    equation, *rest = op.node.args
    operands: list[Any] = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    text = str(equation).replace(" ", "")
    if "..." in text or "->" not in text:
        raise op.refused(f"{equation!r} has no width rule; write all dimensions and the result")
    sources, result = text.split("->")
    meeting: dict[str, list[Dimension]] = {}
    for letters, operand in zip(sources.split(","), operands, strict=True):
        for letter, dimension in zip(letters, op.region(operand), strict=True):
            meeting.setdefault(letter, []).append(dimension)
    shared = {letter: common(dimensions) for letter, dimensions in meeting.items()}
    for letter in set(shared) - set(result):
        for dimension in meeting[letter]:
            op.needs.whole(dimension)
    taken = {}
    for letters, operand in zip(sources.split(","), operands, strict=True):
        region = op.region(operand)
        wanted = tuple(d.keeping(shared[letter].indices) for letter, d in zip(letters, region, strict=True))
        if wanted != region:
            taken[operand] = wanted
    return Cut(tuple(shared[letter] for letter in result), taken)


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
@rule("arange", "zeros", "ones", "empty", "full", "tensor", "rand", "randn", "linspace", "eye")
def _made_here(op: Operator) -> Cut:
    """A tensor made in the forward pass: all of it, cut where it meets others."""
    return Cut(op.output)
