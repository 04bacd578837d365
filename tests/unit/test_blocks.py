"""Units that are whole blocks: against module structure, against cutting graphs by hand, and against layers."""

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slt_planner.config import Config, StepSpec
from slt_planner.errors import InputError
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.trace import trace
from slt_planner.memory.measure import measure
from slt_planner.memory.predict import predict
from slt_planner.models.registry import find_model, load_model, model_names
from slt_planner.planning.network import planned_network
from slt_planner.planning.plan import load_plan
from slt_planner.planning.solve import solve
from slt_planner.planning.verify import verify
from slt_planner.submodel.extract import extract, tensor_indices
from slt_planner.submodel.merge import merge
from tests.reference_resnet import HandCutResNet

torch.manual_seed(0)


@cache
def graphs(name):
    """A network, its graph of layers and its graph of blocks."""
    model = load_model(name)
    return model, trace(model, (3, 32, 32)), trace(model, (3, 32, 32), granularity="block")


def ends_of(layers, blocks):
    """The last layer of each block, after a 0: by the first node after the inputs, which are in all of them."""
    last = {}
    for one, other in zip(layers.programs[True].graph.nodes, blocks.programs[True].graph.nodes, strict=True):
        for key in ("unit", "freezes"):
            last[other.meta[key]] = max(one.meta[key], last.get(other.meta[key], 0))
    return [last.get(block, 0) for block in range(blocks.depth + 1)]


@pytest.mark.parametrize("name", [name for name in model_names() if name.startswith("resnet")])
def test_a_cifar_resnet_has_its_stem_and_its_residual_blocks(name):
    blocks = trace(load_model(name), find_model(name).input_shape, granularity="block")
    per_group = (int(name.removesuffix("_pad").removeprefix("resnet")) - 2) // 6
    expected = [f"group{group}.{block}" for group in (1, 2, 3) for block in range(per_group)]
    assert [unit.name for unit in blocks.units] == ["conv", *expected]
    assert [unit.kind for unit in blocks.units] == ["Conv2d"] + ["block"] * (3 * per_group)
    shapes = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [unit.output_shape for unit in blocks.units[1:]] == [shape for shape in shapes for _ in range(per_group)]
    assert [unit.index for unit in blocks.units] == list(range(1, 3 * per_group + 2))
    assert ends_of(trace(load_model(name), (3, 32, 32)), blocks) == [0, *range(1, 6 * per_group + 2, 2)]


def inverted_residuals(model):
    """By the paper's table (Sandler et al. 2018, arXiv 1801.04381, table 2): expansion, channels, repeats, stride."""
    names, number, incoming = ["features.0.0"], 1, 32
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, channels, repeats, stride in table:
        for repeat in range(repeats):
            path = f"features.{number}.conv"
            if incoming == channels and (stride == 1 or repeat > 0):
                names.append(path)  # the skip connection is open over all of it
            elif expansion > 1:
                names += [f"{path}.0.0", f"{path}.2"]
            else:
                names.append(f"{path}.1")
            number, incoming = number + 1, channels
    return [*names, "features.18.0"]


def residuals_of_transformers(model):
    count = len(model.encoder.layers)
    parts = [f"encoder.layers.encoder_layer_{i}.{part}" for i in range(count) for part in ("self_attention", "mlp")]
    return ["conv_proj", *parts]


def blocks_of_densenet(model):
    """Each layer's outputs stay open until the end of its dense block, where one concatenation holds them all."""
    middle = [f"features.{name}" for i in (1, 2, 3) for name in (f"denseblock{i}", f"transition{i}.conv")]
    return ["features.conv0", *middle, "features.denseblock4"]


def inceptions(model):
    """Heads that training alone uses hang on two of them, and hold no block open."""
    return ["conv1.conv", "conv2.conv", "conv3.conv", *(n for n, _ in model.named_children() if "inception" in n)]


def every_layer(model):
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))][:-1]


@pytest.mark.parametrize(
    ("name", "size", "expected", "depths"),
    [
        ("mobilenet_v2", 64, inverted_residuals, (35, 25)),
        ("vit_b_16", 224, residuals_of_transformers, (37, 25)),
        ("vit_cifar", 32, residuals_of_transformers, (19, 13)),
        ("densenet121", 64, blocks_of_densenet, (120, 8)),
        ("googlenet", 224, inceptions, (57, 12)),
        ("vgg9", 32, every_layer, (8, 8)),
        ("densenet40", 32, every_layer, (39, 39)),  # a layer gives its input and its own channels as one tensor
    ],
)
def test_blocks_of_networks_as_their_modules_are_built(name, size, expected, depths):
    model = load_model(name, weights=False)
    layers, blocks = (trace(model, (3, size, size), granularity=which) for which in ("layer", "block"))
    assert [unit.name for unit in blocks.units] == expected(model)
    assert (layers.depth, blocks.depth) == depths
    assert (layers.hash == blocks.hash) == (layers.units == blocks.units) == (layers.depth == blocks.depth)
    assert (layers.granularity, blocks.granularity) == ("layer", "block")


def test_a_blocks_output_is_what_leaves_it():
    _, _, blocks = graphs("densenet121")
    channels = [unit.output_shape[0] for unit in blocks.units]
    assert channels == [64, 256, 128, 512, 256, 1024, 512, 1024]  # Huang et al. 2017, table 1, growth 32


def test_another_granularity_is_refused():
    with pytest.raises(InputError, match="granularity 'stage': known are layer, block"):
        trace(load_model("convnet"), (3, 32, 32), granularity="stage")


def test_a_network_without_units_has_no_blocks():
    with pytest.raises(InputError, match="no layer to freeze"):
        trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), (3, 2, 2), granularity="block")


class Wired(nn.Module):
    """Layers on a growing list of (N, 4, 6, 6) tensors: each step is a kind and the two entries it takes."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        width = {"join": 8}
        self.layers = nn.ModuleList(nn.Conv2d(width.get(kind, 4), 4, 3, padding=1) for kind, *_ in steps)
        self.last, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        values = [F.pad(x, (0, 0, 0, 0, 0, 1))]
        for layer, (kind, i, j) in zip(self.layers, self.steps, strict=True):
            a, b = values[max(0, len(values) - i)], values[max(0, len(values) - j)]
            values.append(
                {
                    "conv": lambda: F.relu(layer(a)),  # noqa: B023
                    "residual": lambda: b + layer(a),  # noqa: B023
                    "gate": lambda: a * torch.sigmoid(layer(a.mean((2, 3), keepdim=True))),  # noqa: B023
                    "join": lambda: layer(torch.cat([a, b], 1)),  # noqa: B023
                    "halves": lambda: torch.cat([b[:, :2], layer(a).chunk(2, 1)[1]], 1),  # noqa: B023
                    "view": lambda: a.flatten(2).transpose(1, 2).relu().transpose(1, 2).unflatten(2, (6, 6)),  # noqa: B023
                }[kind]()
            )
        return self.fc(self.last(values[-1]).mean((2, 3)))


@st.composite
def wirings(draw):
    kinds = st.sampled_from(["conv", "conv", "residual", "residual", "gate", "join", "halves", "view"])
    # A step takes one of the last three results, and now and then an old one.
    place = st.sampled_from([1, 1, 1, 2, 2, 3, 6])
    return draw(st.lists(st.tuples(kinds, place, place), max_size=9))


def ends_by_removal(graph):
    """Where a block ends, by definition: removing one tensor leaves no way from what is before to what comes after.

    Before are the inputs and the weights of units up to the end, after are all other weights that the output needs.
    """
    nodes = [node for node in graph.programs[True].graph.nodes if node.meta["data"] and node.op != "output"]
    users = {node: [user for user in node.users if user in set(nodes)] for node in nodes}

    def reached(starts, without):
        found, waiting = set(), [node for node in starts if node is not without]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [user for user in users[node] if user is not without]
        return found

    output = {node for node in nodes if any(user.op == "output" for user in node.users)}
    needed = {node for node in nodes if reached([node], None) & output}
    weights = [node for node in needed if node.op == "call_module"]
    ends = []
    for unit in range(1, graph.depth + 1):
        before = [n for n in weights if n.meta["unit"] <= unit] + [n for n in needed if n.op == "placeholder"]
        after = {n for n in weights if n.meta["unit"] > unit} | output
        tensors = [node for node in needed - after if not isinstance(node.meta["dims"][0], tuple)]
        if unit == graph.depth or any(not reached(before, tensor) & after for tensor in tensors):
            ends.append(unit)
    return ends


@given(steps=wirings())
@settings(max_examples=80, deadline=None)
def test_a_block_ends_where_one_tensor_separates_before_from_after(steps):
    network = Wired(steps)
    layers = trace(network, (3, 6, 6))
    blocks = trace(network, (3, 6, 6), granularity="block")
    ends = ends_of(layers, blocks)
    assert ends[1:] == ends_by_removal(layers)
    assert (layers.hash == blocks.hash) == (layers.depth == blocks.depth)
    for mode in (True, False):
        for one, other in zip(layers.programs[mode].graph.nodes, blocks.programs[mode].graph.nodes, strict=True):
            for key in ("unit", "freezes"):  # the unit that holds the layer, and the classifier after all of them
                unit = one.meta[key]
                held = next((i for i, end in enumerate(ends) if unit <= end), blocks.depth + 1)
                assert other.meta[key] == held
            before = [x.meta["unit"] for x in other.all_input_nodes if x.meta["data"]]
            assert other.op == "output" or max([0, *before]) <= other.meta["unit"]
    modules = [unit.modules for unit in layers.units]
    for block, (start, end) in zip(blocks.units, pairwise(ends), strict=True):
        assert block.modules == tuple(name for unit in modules[start:end] for name in unit)


class OnePlace(nn.Module):
    """All that is computed goes to the end."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(17, 5)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return self.fc(torch.cat([x, a, b, self.c(b)], 1).mean((2, 3)))


def test_a_network_whose_every_boundary_is_open_is_one_block():
    graph = trace(OnePlace(), (3, 6, 6), granularity="block")
    assert [(unit.name, unit.kind, unit.output_shape) for unit in graph.units] == [("a .. c", "block", (17, 6, 6))]
    assert graph.head_scales(0) == trace(OnePlace(), (3, 6, 6)).head_scales(0)
    assert graph.head_scales(1) == (1.0,)
    plan = solve(graph, ["1GB"], StepSpec(batch_size=2))
    assert [(stage.full_depth, stage.head_scale) for stage in plan.stages] == [(1, 1.0)]


class WeightsGoOn(nn.Module):
    """Attention whose two results, what was mixed and by how much, both go on."""

    def __init__(self, both):
        super().__init__()
        self.both = both
        self.stem, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.next, self.fc = nn.Linear(8, 8), nn.Linear(8 + 5 * both, 3)

    def forward(self, x):
        x = self.stem(x)
        mixed, weights = self.attention(x, x, x)
        outputs = self.next(mixed).mean(1)
        return self.fc(torch.cat([outputs, weights.mean(1)], 1) if self.both else outputs)


@pytest.mark.parametrize("both", [False, True])
def test_an_operator_that_gives_two_tensors_gives_one_only_where_one_is_used(both):
    graph = trace(WeightsGoOn(both), (5, 4), granularity="block")
    expected = ["stem", "attention .. next"] if both else ["stem", "attention", "next"]
    assert [unit.name for unit in graph.units] == expected


class GateBetween(nn.Module):
    """A gate belongs to the unit of what it gates; here both what was gated and what was not go on."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.next, self.fc = *(nn.Conv2d(n, 4, 1) for n in (3, 4, 4)), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        gated = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.fc((x + self.next(gated)).mean((2, 3)))


def test_what_a_gate_gives_is_a_tensor_of_its_own():
    assert trace(GateBetween(), (3, 6, 6)).depth == 2
    graph = trace(GateBetween(), (3, 6, 6), granularity="block")
    assert [(unit.name, unit.modules) for unit in graph.units] == [("stem .. next", ("stem", "gate", "next"))]


RESIDUALS = [f"body.{group}.{i}" for group, count in (("layer1", 3), ("layer2", 4)) for i in range(count)]
CONVOLUTIONS = [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21)]  # of VGG16, up to conv4_3


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("fasterrcnn_resnet50_fpn", ["body.conv1", *RESIDUALS[:3]]),
        ("retinanet_resnet50_fpn", ["body.conv1", *RESIDUALS]),
        ("ssd300_vgg16", CONVOLUTIONS),
    ],
)
def test_a_detectors_backbone_is_open_from_the_first_map_on_that_it_gives(name, closed):
    """A pyramid of resnet50's four groups (Lin et al. 2017), of its last three; conv4_3 of VGG16 (Liu et al. 2016)."""
    graph = trace(load_model(name, weights=False), (3, 64, 64), granularity="block")
    names = [unit.name for unit in graph.units]
    assert names[:-1] == [f"backbone.{part}" for part in closed]
    assert graph.units[-1].kind == "block"
    assert graph.untraced
    assert {graph.unit_of_tensor()[name] for name in graph.untraced} == {graph.depth + 1}


class SharedTable(nn.Module):
    """Two residual blocks: one scale is used in both, and on the middle of the first hangs an auxiliary head."""

    slt_adapter = type("Logits", (Adapter,), {"scores": lambda self, outputs: outputs["logits"]})()

    def __init__(self):
        super().__init__()
        self.stem, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(4, 1, 1))
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.side, self.fc = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        middle = F.relu(self.a(x))
        side = self.side(middle.mean((2, 3))) if self.training else None
        x = x + self.b(middle) * self.scale
        x = x + self.d(F.relu(self.c(x))) * self.scale
        return {"side": side, "logits": self.fc(x.mean((2, 3)))}


def test_what_several_blocks_use_and_what_hangs_in_the_middle_of_one():
    network = SharedTable()
    graph = trace(network, (3, 6, 6), granularity="block")
    assert [unit.name for unit in graph.units] == ["stem", "a .. b", "c .. d"]
    units = graph.unit_of_tensor()
    assert units["scale"] == 3  # it freezes with the last block that uses it
    assert units["side.weight"] == 2
    images = torch.randn(2, 3, 6, 6)
    kept = extract(graph, network, Config(freeze_depth=1, full_depth=2, head_scale=0.5))
    dropped = extract(graph, network, Config(freeze_depth=2, full_depth=3, head_scale=0.5))
    assert kept(images)["side"].shape == (2, 5)
    assert dropped(images)["side"] is None
    assert dropped.scale.requires_grad


NETWORKS = ["resnet20", "vit_cifar", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("frozen_of", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("notch", [0, 2])
def test_a_sub_model_of_blocks_is_that_of_the_layers_they_hold(name, frozen_of, notch):
    model, layers, blocks = graphs(name)
    ends = ends_of(layers, blocks)
    freeze_depth = int(frozen_of * (blocks.depth - 1))
    full_depth = freeze_depth + 1 if frozen_of else 0
    scales = blocks.head_scales(full_depth)
    assert scales == layers.head_scales(ends[full_depth])
    scale = scales[notch * len(scales) // 3]
    ours = Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=scale)
    theirs = Config(freeze_depth=ends[freeze_depth], full_depth=ends[full_depth], head_scale=scale)
    assert tensor_indices(blocks, ours) == tensor_indices(layers, theirs)
    images = torch.randn(2, 3, 32, 32)
    outputs, gradients = [], []
    for graph, config in ((blocks, ours), (layers, theirs)):
        sub = extract(graph, model, config)
        torch.manual_seed(1)
        outputs.append(sub(images))
        outputs[-1].square().sum().backward()
        gradients.append({key: p.grad for key, p in sub.named_parameters()})
        state = model.state_dict()
        merged = merge(graph, state, [(config, sub.trained_state(), 3)])
        assert all(torch.equal(merged[key], state[key]) for key in state)
    assert torch.equal(*outputs)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        units = blocks.unit_of_tensor()[key]
        assert (gradient is None) == (gradients[1][key] is None) == (units <= freeze_depth)
        assert gradient is None or torch.equal(gradient, gradients[1][key])


@pytest.mark.parametrize("blocks_frozen", [0, 1, 4, 8])
def test_gradients_of_blocks_equal_those_of_a_network_cut_by_hand(blocks_frozen):
    model, _, graph = graphs("resnet20")
    config = Config(freeze_depth=blocks_frozen, full_depth=blocks_frozen + 1, head_scale=0.375)
    frozen = 0 if blocks_frozen == 0 else 2 * blocks_frozen - 1  # the stem is one layer, a block two
    reference = HandCutResNet(3, 2 * blocks_frozen + 1, config.head_scale)
    reference.load_from(model, frozen)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 0, 3, 9])
    sub = extract(graph, model, config)
    for network in (sub, reference):
        F.cross_entropy(network(images), labels).backward()
    own = dict(sub.named_parameters())
    for layer, name, number in reference.pairs():
        for key, parameter in layer.named_parameters():
            gradient = own[f"{name}.{key}"].grad
            assert (gradient is None) == (0 < number <= frozen)
            assert gradient is None or torch.equal(gradient, parameter.grad), f"{name}.{key}"


@pytest.mark.parametrize("name", NETWORKS)
def test_the_full_configuration_is_the_model_in_both_modes(name):
    model, _, graph = graphs(name)
    images = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        outputs = []
        for network in (extract(graph, model, Config.full_network(), "running"), copy.deepcopy(model)):
            torch.manual_seed(1)
            outputs.append(network.train(mode)(images))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("way", ["measured", "predicted"])
def test_a_blocks_row_adds_up_its_layers_rows(way):
    _, layers, blocks = graphs("resnet20")
    ends = ends_of(layers, blocks)
    spec = StepSpec(batch_size=2)
    ours = Config(freeze_depth=3, full_depth=5, head_scale=0.5)
    theirs = Config(freeze_depth=ends[3], full_depth=ends[5], head_scale=0.5)
    rows = {}
    for graph, config in ((blocks, ours), (layers, theirs)):
        made = measure(extract(graph, None, config), spec) if way == "measured" else predict(graph, config, spec)
        rows[graph.granularity] = made
    assert rows["block"].tensor_peak_bytes == rows["layer"].tensor_peak_bytes
    figures = [
        n for n in type(rows["block"].units[0]).model_fields if n not in ("index", "name", "kind", "output_shape")
    ]
    for row, (start, end) in zip(rows["block"].units, pairwise([*ends, layers.depth + 1]), strict=True):
        for figure in figures:
            parts = [getattr(part, figure) for part in rows["layer"].units[start:end]]
            assert getattr(row, figure) == sum(parts), (row.name, figure)
    assert rows["block"].units[-1].name == "classifier"


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.b(F.relu(self.a(x))))


def small_residual_network():
    down = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), Residual(4), down, Residual(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )


@pytest.mark.parametrize("filled", [0.15, 0.4, 0.7, 0.95])
def test_a_plan_of_blocks_is_the_one_that_brute_force_finds_among_layers(filled, tmp_path):
    """METHOD's definition over every legal configuration whose depths are block ends: 0, 1, 3, 4, 6."""
    network, spec, ends = small_residual_network(), StepSpec(batch_size=4, threads=1), [0, 1, 3, 4, 6]
    layers, graph = (trace(network, (3, 16, 16), granularity=which) for which in ("layer", "block"))
    assert (layers.depth, graph.depth) == (6, 4)

    @cache
    def peak(freeze, full, scale):
        full = 4 if scale == 1.0 else full
        config = Config(freeze_depth=ends[freeze], full_depth=ends[full], head_scale=scale)
        return measure(extract(layers, None, config), spec, details=False).peak_bytes

    def largest(full):
        fitting = [s for s in layers.head_scales(ends[full]) if peak(max(0, full - 1), full, s) <= budget]
        return max(fitting, default=None)

    low = max(peak(max(0, full - 1), full, layers.head_scales(ends[full])[0]) for full in range(4))
    budget = int(low + filled * (peak(0, 0, 1.0) - low))
    heads = []
    for full in range(5):
        heads.append(largest(full))
        if heads[-1] == 1.0:
            break
    later = [(4 if min(heads[k:]) == 1.0 else k, min(heads[k:])) for k in range(1, len(heads))]
    shared = [(0, min(heads[0], later[0][1])), *later]
    expected = [(min(f for f in range(max(1, k)) if peak(f, k, s) <= budget), k, s) for k, s in shared]

    plan = solve(graph, [f"{budget}B"], spec)
    (tier,) = plan.tiers
    assert [(s.freeze_depth, s.full_depth, s.head_scale) for s in tier.stages] == expected
    assert plan.model.granularity == "block"
    assert plan.model.unit_names == ("0", "1", "2.0", "3")
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    assert planned_network(loaded, network)[1].hash == graph.hash
    verification = verify(loaded, network)
    assert len(verification.peaks) == len(tier.stages) + len(tier.proofs)
    assert all(peak.holds for peak in verification.peaks)
    of_layers = loaded.model_copy(update={"model": loaded.model.model_copy(update={"granularity": "layer"})})
    with pytest.raises(InputError, match="the model is not the plan's"):
        planned_network(of_layers, network)
