"""One small network a kind of layer: cut, against the same arithmetic written out by hand on sliced weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slt_planner.config import Config, StepSpec
from slt_planner.errors import InputError, UnsupportedLayerError
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.trace import trace
from slt_planner.graph.widths import Cut, Operator, rule
from slt_planner.memory.measure import measure
from slt_planner.models.registry import load_model
from slt_planner.submodel.extract import extract, tensor_indices
from slt_planner.submodel.merge import merge

HALF = Config(freeze_depth=0, full_depth=0, head_scale=0.5)


class Net(nn.Module):
    """Parts by name, and what is done with them."""

    def __init__(self, work, **parts):
        super().__init__()
        self.work = work
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.work(self, *inputs)


def pooled(x):
    return x.mean((2, 3))


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


def conv(incoming, out, size=1, groups=1):
    return nn.Conv2d(incoming, out, size, groups=groups, padding=size // 2, bias=False)


def with_by_hand(network, by_hand, config, shape=(3, 6, 6)):
    """Outputs and gradients of the cut network, and of `by_hand`, which gets the full weights to slice."""
    torch.manual_seed(0)
    network = network.double()
    images = torch.randn(4, *shape, dtype=torch.float64)
    graph = trace(network, shape)
    sub = extract(graph, network, config)
    weights = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    outputs, expected = sub(images), by_hand(weights, images)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    indices = tensor_indices(graph, config)
    for name, own in sub.named_parameters():
        index = [list(d.indices) for d in indices[name]]
        gradient = weights[name].grad
        for dim, kept in enumerate(index):
            gradient = gradient.index_select(dim, torch.tensor(kept))
        torch.testing.assert_close(own.grad, gradient, rtol=1e-9, atol=1e-9, msg=name)
    return graph


def test_grouped_convolutions_keep_whole_groups_and_their_producers_whole_steps():
    network = Net(
        lambda n, x: n.fc(pooled(n.b(n.a(x)))), a=conv(3, 12), b=conv(12, 24, 3, groups=6), fc=nn.Linear(24, 5)
    )

    def by_hand(w, x):
        x = F.conv2d(x, w["a.weight"][:6])
        x = F.conv2d(x, w["b.weight"][:12], padding=1, groups=3)
        return F.linear(pooled(x), w["fc.weight"][:, :12], w["fc.bias"])

    graph = with_by_hand(network, by_hand, HALF)
    assert graph.depth == 2
    assert graph.head_scales(0) == tuple(k / 6 for k in range(1, 7))  # both in steps of whole groups


def test_a_depthwise_convolution_follows_its_producer_and_is_no_unit():
    network = Net(
        lambda n, x: n.fc(pooled(n.deep(n.a(x)))), a=conv(3, 8), deep=conv(8, 16, 3, groups=8), fc=nn.Linear(16, 5)
    )

    def by_hand(w, x):
        x = F.conv2d(F.conv2d(x, w["a.weight"][:4]), w["deep.weight"][:8], padding=1, groups=4)
        return F.linear(pooled(x), w["fc.weight"][:, :8], w["fc.bias"])

    assert with_by_hand(network, by_hand, HALF).depth == 1


def test_gated_halves_keep_the_same_channels_of_both():
    network = Net(lambda n, x: n.fc(pooled(F.glu(n.a(x), 1))), a=conv(3, 12), fc=nn.Linear(6, 5))

    def by_hand(w, x):
        x = F.conv2d(x, w["a.weight"][[0, 1, 2, 6, 7, 8]])
        return F.linear(pooled(x[:, :3] * torch.sigmoid(x[:, 3:])), w["fc.weight"][:, :3], w["fc.bias"])

    with_by_hand(network, by_hand, HALF)


def test_transposed_convolutions():
    network = Net(
        lambda n, x: n.fc(pooled(n.up(n.a(x)))),
        a=conv(3, 8),
        up=nn.ConvTranspose2d(8, 6, 2, 2),
        fc=nn.Linear(6, 5),
    )

    def by_hand(w, x):
        x = F.conv_transpose2d(F.conv2d(x, w["a.weight"][:4]), w["up.weight"][:4, :3], w["up.bias"][:3], stride=2)
        return F.linear(pooled(x), w["fc.weight"][:, :3], w["fc.bias"])

    assert with_by_hand(network, by_hand, HALF).depth == 2


def test_group_layer_and_instance_norms():
    def work(n, x):
        x = n.instance(n.group(n.a(x)))
        return n.fc(n.layer(x.permute(0, 2, 3, 1)).mean((1, 2)))

    network = Net(
        work,
        a=conv(3, 12),
        group=nn.GroupNorm(4, 12),
        instance=nn.InstanceNorm2d(12, affine=True),
        layer=nn.LayerNorm(12),
        fc=nn.Linear(12, 5),
    )

    def by_hand(w, x):
        x = F.group_norm(F.conv2d(x, w["a.weight"][:6]), 2, w["group.weight"][:6], w["group.bias"][:6])
        x = F.instance_norm(x, weight=w["instance.weight"][:6], bias=w["instance.bias"][:6])
        x = F.layer_norm(x.permute(0, 2, 3, 1), (6,), w["layer.weight"][:6], w["layer.bias"][:6])
        return F.linear(x.mean((1, 2)), w["fc.weight"][:, :6], w["fc.bias"])

    graph = with_by_hand(network, by_hand, HALF)
    assert graph.head_scales(0) == (0.25, 0.5, 0.75, 1.0)  # whole groups of three


def test_concatenations_keep_the_union_and_a_split_of_them_keeps_the_parts():
    def work(n, x):
        a, b = n.a(x), n.b(x)
        first, second = n.c(torch.cat([a, b], 1)).split([4, 4], dim=1)
        return n.fc(pooled(torch.cat([a, first * second], 1)))

    network = Net(work, a=conv(3, 6), b=conv(3, 4), c=conv(10, 8), fc=nn.Linear(10, 5))

    def by_hand(w, x):
        a, b = F.conv2d(x, w["a.weight"][:3]), F.conv2d(x, w["b.weight"][:2])
        c = w["c.weight"][:, [0, 1, 2, 6, 7]]
        first, second = F.conv2d(torch.cat([a, b], 1), c[[0, 1, 4, 5]]).chunk(2, 1)
        features = pooled(torch.cat([a, first * second], 1))
        return F.linear(features, w["fc.weight"][:, [0, 1, 2, 6, 7]], w["fc.bias"])

    with_by_hand(network, by_hand, HALF)


def test_a_gate_follows_what_it_gates_and_is_no_unit():
    def work(n, x):
        x = n.a(x)
        gate = n.grow(F.relu(n.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return n.fc(pooled(x * torch.sigmoid(gate)))

    network = Net(work, a=conv(3, 8), squeeze=conv(8, 4), grow=conv(4, 8), fc=nn.Linear(8, 5))

    def by_hand(w, x):
        x = F.conv2d(x, w["a.weight"][:4])
        gate = F.relu(F.conv2d(F.adaptive_avg_pool2d(x, 1), w["squeeze.weight"][:2, :4]))
        x = x * torch.sigmoid(F.conv2d(gate, w["grow.weight"][:4, :2]))
        return F.linear(pooled(x), w["fc.weight"][:, :4], w["fc.bias"])

    graph = with_by_hand(network, by_hand, HALF)
    assert [unit.modules for unit in graph.units] == [("a", "squeeze", "grow")]


def test_channel_shuffle_takes_the_same_channels_of_every_group():
    def work(n, x):
        x = torch.cat([n.a(x), n.b(x)], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return n.fc(pooled(x))

    network = Net(work, a=conv(3, 4), b=conv(3, 4), fc=nn.Linear(8, 5))

    def by_hand(w, x):
        a, b = F.conv2d(x, w["a.weight"][:2]), F.conv2d(x, w["b.weight"][:2])
        x = torch.stack([a, b], 2).flatten(1, 2)
        return F.linear(pooled(x), w["fc.weight"][:, :4], w["fc.bias"])

    with_by_hand(network, by_hand, HALF)


def test_at_the_boundary_what_is_wide_is_cut_before_a_shuffle():
    """The second branch is scaled, the first is not: of every group the same channels."""

    def work(n, x):
        x = n.a(x)
        x = torch.cat([x, n.b(x)], 1)
        return n.fc(pooled(F.channel_shuffle(x, 2)))

    network = Net(work, a=conv(3, 4), b=conv(4, 4), fc=nn.Linear(8, 5))

    def by_hand(w, x):
        x = F.conv2d(x, w["a.weight"])
        x = torch.stack([x[:, :2], F.conv2d(x, w["b.weight"][:2])], 2).flatten(1, 2)
        return F.linear(pooled(x), w["fc.weight"][:, :4], w["fc.bias"])

    with_by_hand(network, by_hand, Config(freeze_depth=0, full_depth=1, head_scale=0.5))


def test_parameters_used_directly_follow_what_they_meet():
    def work(n, x):
        x = n.a(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([n.token.expand(len(x), -1, -1), x], 1) + n.positions
        return n.fc((tokens @ n.mix * n.scale)[:, 0])

    network = Net(
        work,
        a=conv(3, 8),
        token=parameter(1, 1, 8),
        positions=parameter(1, 37, 8),
        mix=parameter(8, 6),
        scale=parameter(6),
        fc=nn.Linear(6, 5),
    )

    def by_hand(w, x):
        x = F.conv2d(x, w["a.weight"][:4]).flatten(2).transpose(1, 2)
        tokens = torch.cat([w["token"][..., :4].expand(len(x), -1, -1), x], 1) + w["positions"][..., :4]
        mixed = tokens @ w["mix"][:4, :3] * w["scale"][:3]
        return F.linear(mixed[:, 0], w["fc.weight"][:, :3], w["fc.bias"])

    graph = with_by_hand(network, by_hand, HALF)
    assert graph.depth == 2
    assert graph.unit_of_tensor() == {
        "a.weight": 1, "token": 1, "positions": 1, "mix": 2, "scale": 2, "fc.weight": 3, "fc.bias": 3,
    }  # fmt: skip


def attention_by_hand(w, x, heads, width, stream):
    """Six heads of four, of which the first `heads`, on the first `stream` channels."""
    rows = [part * 24 + i for part in range(3) for i in range(width)]
    q, k, v = F.linear(x, w["qkv.weight"][rows][:, :stream], w["qkv.bias"][rows]).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (heads, 4)).transpose(1, 2) for t in (q, k, v))
    mixed = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
    return F.linear(mixed.transpose(1, 2).flatten(2), w["proj.weight"][:width, :width], w["proj.bias"][:width])


def attention_work(n, x):
    x = n.a(x).flatten(2).transpose(1, 2)
    batch, positions, channels = x.shape
    qkv = n.qkv(x).reshape(batch, positions, 3, 6, channels // 6).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    attention = ((q * (channels // 6) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    x = x + n.proj((attention @ v).transpose(1, 2).reshape(batch, positions, channels))
    return n.fc(x.mean(1))


@pytest.mark.parametrize("full_depth", [0, 1])
def test_written_out_attention_keeps_whole_heads_and_is_one_unit(full_depth):
    network = Net(attention_work, a=conv(3, 24), qkv=nn.Linear(24, 72), proj=nn.Linear(24, 24), fc=nn.Linear(24, 5))
    stream = 24 if full_depth else 12

    def by_hand(w, x):
        x = F.conv2d(x, w["a.weight"][:stream]).flatten(2).transpose(1, 2)
        x = x[..., :12] + attention_by_hand(w, x, 3, 12, stream)
        return F.linear(x.mean(1), w["fc.weight"][:, :12], w["fc.bias"])

    graph = with_by_hand(network, by_hand, Config(freeze_depth=0, full_depth=full_depth, head_scale=0.5))
    assert [unit.modules for unit in graph.units] == [("a",), ("qkv", "proj")]
    assert graph.head_scales(0) == tuple(k / 6 for k in range(1, 7))  # the stream is whole heads wide


@pytest.mark.parametrize("full_depth", [0, 1])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_at_the_boundary_projects_from_the_wide_stream(full_depth, need_weights):
    def work(n, x):
        x = n.a(x).flatten(2).transpose(1, 2)
        x = x + n.attention(x, x, x, need_weights=need_weights)[0]
        return n.fc(x.mean(1))

    network = Net(work, a=conv(3, 24), attention=nn.MultiheadAttention(24, 6, batch_first=True), fc=nn.Linear(24, 5))
    stream = 24 if full_depth else 12

    def by_hand(w, x):
        own = {
            "qkv.weight": w["attention.in_proj_weight"],
            "qkv.bias": w["attention.in_proj_bias"],
            "proj.weight": w["attention.out_proj.weight"],
            "proj.bias": w["attention.out_proj.bias"],
        }
        x = F.conv2d(x, w["a.weight"][:stream]).flatten(2).transpose(1, 2)
        x = x[..., :12] + attention_by_hand(own, x, 3, 12, stream)
        return F.linear(x.mean(1), w["fc.weight"][:, :12], w["fc.bias"])

    with_by_hand(network, by_hand, Config(freeze_depth=0, full_depth=full_depth, head_scale=0.5))


def test_a_network_used_on_two_inputs_is_cut_once_and_its_uses_agree():
    class TwoHalves(Adapter):
        def inputs(self, images):
            return images[:, :3], images[:, 3:]

    def work(n, left, right):
        return n.fc(torch.cat([pooled(n.b(F.relu(n.a(x)))) for x in (left, right)], 1))

    network = Net(work, a=conv(3, 8, 3), b=conv(8, 6, 3), fc=nn.Linear(12, 5))
    network.slt_adapter = TwoHalves()
    graph = trace(network, (6, 6, 6))
    assert [unit.name for unit in graph.units] == ["a", "b"]
    sub = extract(graph, network, HALF)
    images = torch.randn(4, 6, 6, 6)
    branch = lambda x: pooled(F.conv2d(F.relu(F.conv2d(x, sub.a.weight, padding=1)), sub.b.weight, padding=1))  # noqa: E731
    features = torch.cat([branch(images[:, :3]), branch(images[:, 3:])], 1)
    torch.testing.assert_close(sub(*graph.adapter.inputs(images)), sub.fc(features))
    assert sub.fc.weight.shape == (5, 6)
    merged = merge(graph, network.state_dict(), [(HALF, sub.trained_state(), 2)])
    assert all(torch.equal(merged[name], value) for name, value in network.state_dict().items())


def test_tied_weights_are_one_parameter_and_come_back_under_both_names():
    def work(n, x):
        return n.fc(torch.cat([pooled(n.a(x)), pooled(n.b(x.flip(-1)))], 1))

    network = Net(work, a=conv(3, 8, 3), b=conv(3, 8, 3), fc=nn.Linear(16, 5))
    network.b.weight = network.a.weight
    graph = trace(network, (3, 6, 6))
    sub = extract(graph, network, HALF)
    assert sub.a.weight is sub.b.weight
    assert sorted(sub.trained_state()) == sorted(sub.held_state()) == ["a.weight", "fc.bias", "fc.weight"]
    update = {name: value + 1 for name, value in sub.trained_state().items()}
    merged = merge(graph, network.state_dict(), [(HALF, update, 1)])
    assert torch.equal(merged["a.weight"], merged["b.weight"])
    torch.testing.assert_close(merged["a.weight"][:4], network.a.weight[:4] + 1)
    assert torch.equal(merged["a.weight"][4:], network.a.weight[4:])


@pytest.mark.parametrize(
    "work",
    [
        lambda n, x: x.mean(axis=(2, 3)),
        lambda n, x: x.flip(2, 3).roll(1, dims=2).sum((2, 3)),
        lambda n, x: torch.var_mean(x, dim=(2, 3))[1],
        lambda n, x: F.pad(x, (1, 1)).amax(dim=(-2, -1)),
        lambda n, x: torch.einsum("nchw,nchw->nc", x, x),
        lambda n, x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2).mean((2, 3)),
        lambda n, x: (x[:, :, 1:3, None, 0] ** 2).mean((2, 3)),
        lambda n, x: x.select(2, 0).narrow(2, 0, 2).sum(-1),
        lambda n, x: x.contiguous().view(len(x), 8, -1).max(dim=-1).values,
        lambda n, x: torch.stack([x, x.clamp(min=0)], 2).mean((2, 3, 4)),
        lambda n, x: pooled(torch.where(x > 0, x, x * 0.1)),
    ],
)
def test_everyday_operators_between_a_convolution_and_a_classifier(work):
    """What comes to the classifier is what the narrow network built by hand gives it, entry by entry."""
    network = Net(lambda n, x: n.fc(work(n, n.a(x))), a=conv(3, 8), fc=nn.Linear(8, 5)).double()
    graph = trace(network, (3, 6, 6))
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    for scale in graph.head_scales(0)[:-1]:
        config = Config(freeze_depth=0, full_depth=0, head_scale=scale)
        sub = extract(graph, network, config)
        kept = list(tensor_indices(graph, config)["fc.weight"][1].indices)
        full = work(network, network.a(images))
        narrow = copy.deepcopy(network)
        with torch.no_grad():  # channels that are left out, as if they were zero
            made = tensor_indices(graph, config)["a.weight"][0].indices
            narrow.a.weight[[i for i in range(8) if i not in made]] = 0
        expected = F.linear(work(narrow, narrow.a(images))[:, kept], network.fc.weight[:, kept], network.fc.bias)
        assert full.shape[1] >= len(kept)
        torch.testing.assert_close(sub(images), expected)


class AuxiliaryHead(nn.Module):
    """Two convolutions; on the first hangs a head that training alone uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8, 3), conv(8, 8, 3)
        self.side, self.side_fc = conv(8, 6), nn.Linear(6, 5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x)
        side = self.side_fc(pooled(self.side(x))) if self.training else None
        return {"side": side, "logits": self.fc(pooled(self.b(x)))}


class Logits(Adapter):
    def scores(self, outputs):
        return outputs["logits"]


def test_auxiliary_heads_stay_whole_and_go_when_their_place_is_frozen():
    network = AuxiliaryHead()
    graph = trace(network, (3, 6, 6), Logits())
    assert [unit.name for unit in graph.units] == ["a", "b"]
    images = torch.randn(4, 3, 6, 6)
    warm_up = extract(graph, network, HALF)
    assert warm_up.side.weight.shape == (6, 4, 1, 1)
    assert warm_up(images)["side"].shape == (4, 5)
    assert warm_up.eval()(images)["side"] is None
    frozen = extract(graph, network, Config(freeze_depth=1, full_depth=2, head_scale=0.5))
    assert frozen(images)["side"] is None
    assert not any(name.startswith("side") for name, _ in frozen.named_parameters())
    assert set(frozen.trained_state()) == {"b.weight", "fc.weight", "fc.bias"}


class FrozenFeature(nn.Module):
    """Outputs beside the logits: a feature of the first layer, and one of the second that is made with it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x):
        one = self.a(x)
        other, still = self.b(one), one.detach()
        return {"logits": self.fc(pooled(other)), "one": still, "other": other + still}


def test_an_auxiliary_output_may_need_what_is_frozen():
    network = FrozenFeature()
    sub = extract(trace(network, (3, 6, 6), Logits()), network, Config(freeze_depth=1, full_depth=2, head_scale=1.0))
    images = torch.randn(4, 3, 6, 6)
    outputs, expected = sub(images), network(images)
    assert outputs["one"] is None
    for name in ("logits", "other"):
        assert torch.equal(outputs[name], expected[name])


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_is_never_cut_below_one_head(heads):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Conv2d(3, 8, 2, 2), nn.MultiheadAttention(8, heads, batch_first=True)
            self.mix, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            return self.fc(self.mix(self.attention(x, x, x, need_weights=False)[0]).mean(1))

    network = Attending()
    graph = trace(network, (3, 6, 6))
    for full_depth in (0, 1):
        for head_scale in graph.head_scales(full_depth):
            sub = extract(graph, network, Config(freeze_depth=0, full_depth=full_depth, head_scale=head_scale))
            assert sub(torch.randn(2, 3, 6, 6)).shape == (2, 5)
            assert sub.attention.num_heads == (1 if head_scale < 1 else heads)
            assert sub.mix.out_features == round(8 * head_scale)


class Noisy(nn.Module):
    """Dropout by three ways, and stochastic depth written by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8, 3), conv(8, 8, 3), nn.Linear(8, 5)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = self.drop(self.a(x))
        if self.training:
            x = x + self.b(x) * torch.empty(len(x), 1, 1, 1, device=x.device).bernoulli_(0.5)
        else:
            x = x + self.b(x) * 0.5
        return self.fc(F.dropout(pooled(x), 0.2, self.training))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [2, 5])
def test_stochastic_layers_are_right_in_both_modes_and_for_any_batch(training, batch):
    network = Noisy()
    sub = extract(trace(network, (3, 6, 6)), network, Config.full_network()).train(training)
    images = torch.randn(batch, 3, 6, 6)
    outputs = []
    for model in (sub, network.train(training)):
        torch.manual_seed(3)
        outputs.append(model(images))
    assert torch.equal(*outputs)


class Halved(nn.Module):
    """A layer of the user's own: the mean of neighbouring channels."""

    def forward(self, x):
        return torch.stack(torch.unbind(x.unfold(1, 2, 2), -1)).mean(0)


def test_a_kind_is_taught_by_a_rule():
    network = Net(lambda n, x: n.fc(pooled(n.halved(n.a(x)))), a=conv(3, 8), halved=Halved(), fc=nn.Linear(4, 5))
    with pytest.raises(UnsupportedLayerError, match="halved: unfold has no width rule"):
        trace(network, (3, 6, 6))

    @rule(Halved)
    def _halved(op: Operator) -> Cut:
        batch, channels, *positions = op.region(op.argument(0, "x"))
        op.needs.steps(channels, 2)
        kept = op.output[1].keeping(range(channels.width // 2))
        return Cut((batch, kept, *positions))

    graph = trace(network, (3, 6, 6))
    assert graph.head_scales(0) == (0.25, 0.5, 0.75, 1.0)
    sub = extract(graph, network, HALF)
    assert sub.fc.weight.shape == (5, 2)
    assert sub(torch.randn(2, 3, 6, 6)).shape == (2, 5)


@pytest.mark.parametrize("name", ["densenet40", "vgg9", "convnet", "vit_cifar"])
def test_reference_networks_in_full_are_themselves(name):
    model = load_model(name)
    graph = trace(model, (3, 32, 32))
    assert graph.depth == {"densenet40": 39, "vgg9": 8, "convnet": 3, "vit_cifar": 19}[name]
    images = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        sub = extract(graph, model, Config.full_network(), "running").train(mode)
        assert torch.equal(sub(images), copy.deepcopy(model).train(mode)(images))


def test_parameters_of_reference_networks():
    """DenseNet40 (k = 12): 1.0 million (Huang et al. 2017, table 2); counted by hand for the others."""
    counts = {n: sum(p.numel() for p in load_model(n).parameters()) for n in ("densenet40", "vgg9", "convnet")}
    convnet = 32 * 75 + 32 + 64 * 800 + 64 + 512 * 4096 + 512 + 5130
    assert counts == {"densenet40": 1_019_722, "vgg9": 3_491_530, "convnet": convnet}


def squeeze_excite(n, x):
    """As it is copied most: sizes are taken from the input and written into a view."""
    x = n.a(x)
    batch, channels = x.shape[:2]
    gate = n.grow(F.relu(n.squeeze(x.mean((2, 3))))).sigmoid().view(batch, channels, 1, 1)
    return n.fc(pooled(n.b(x * gate.expand_as(x))))


def selective_kernel(n, x):
    x = n.a(x)
    p, q = n.p(x), n.q(x)
    weights = n.choose((p + q).mean((2, 3))).view(len(x), 2, -1, 1, 1).softmax(1)
    return n.fc(pooled((torch.stack([p, q], 1) * weights).sum(1)))


def group_norm_by_hand(n, x):
    x = n.a(x)
    groups = x.view(len(x), 4, -1)
    groups = (groups - groups.mean(-1, keepdim=True)) / groups.std(-1, keepdim=True)
    return n.fc(pooled(n.b(groups.view(x.shape))))


def mixer(n, x):
    x = n.a(x).flatten(2).transpose(1, 2)
    x = x + n.tokens_out(F.gelu(n.tokens_in(x.transpose(1, 2)))).transpose(1, 2)
    return n.fc(n.channels(x).mean(1))


def einsum_attention(n, x):
    x = n.a(x).flatten(2).transpose(1, 2)
    q, k, v = (part(x).view(len(x), 36, 4, 4) for part in (n.q, n.k, n.v))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
    return n.fc((x + n.p(torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(len(x), 36, 16))).mean(1))


def standardised(n, x):
    weight = (n.w - n.w.mean((1, 2, 3), keepdim=True)) / n.w.var((1, 2, 3), keepdim=True).sqrt()
    return n.fc(pooled(F.conv2d(n.a(x), weight) * n.scale[None, :, None, None]))


@pytest.mark.parametrize(
    ("network", "units", "widths"),
    [
        (
            Net(
                squeeze_excite,
                a=conv(3, 16), squeeze=nn.Linear(16, 8), grow=nn.Linear(8, 16), b=conv(16, 8), fc=nn.Linear(8, 5),
            ),
            [("a", "squeeze", "grow"), ("b",)],
            {"squeeze.weight": (4, 8), "grow.weight": (8, 4), "b.weight": (4, 8)},
        ),
        (
            Net(
                selective_kernel,
                a=conv(3, 8), p=conv(8, 8), q=conv(8, 8), choose=nn.Linear(8, 16), fc=nn.Linear(8, 5),
            ),
            [("a",), ("p",), ("q",), ("choose",)],
            {"p.weight": (4, 4), "q.weight": (4, 4), "choose.weight": (8, 4), "fc.weight": (5, 4)},
        ),
        (
            Net(group_norm_by_hand, a=conv(3, 16), b=conv(16, 8), fc=nn.Linear(8, 5)),
            [("a",), ("b",)],
            {"a.weight": (8, 3), "b.weight": (4, 8)},
        ),
        (
            Net(
                mixer,
                a=conv(3, 8), tokens_in=nn.Linear(36, 24), tokens_out=nn.Linear(24, 36), channels=nn.Linear(8, 6),
                fc=nn.Linear(6, 5),
            ),
            [("a",), ("tokens_in",), ("tokens_out",), ("channels",)],
            {"tokens_in.weight": (12, 36), "tokens_out.weight": (36, 12), "channels.weight": (3, 4)},
        ),
        (
            Net(
                einsum_attention,
                a=conv(3, 16), q=nn.Linear(16, 16), k=nn.Linear(16, 16), v=nn.Linear(16, 16), p=nn.Linear(16, 16),
                fc=nn.Linear(16, 5),
            ),
            [("a",), ("q", "k", "v", "p")],
            {"q.weight": (8, 8), "k.weight": (8, 8), "p.weight": (8, 8), "fc.weight": (5, 8)},
        ),
        (
            Net(standardised, a=conv(3, 8), w=parameter(6, 8, 1, 1), scale=parameter(6), fc=nn.Linear(6, 5)),
            [("a",), ()],
            {"w": (3, 4, 1, 1), "scale": (3,), "fc.weight": (5, 3)},
        ),
    ],
    ids=["squeeze-excite", "selective-kernel", "group-norm", "mixer", "einsum-attention", "standardised"],
)  # fmt: skip
def test_units_and_half_widths_of_what_is_written_out_by_hand(network, units, widths):
    graph = trace(network, (3, 6, 6))
    assert [unit.modules for unit in graph.units] == units
    kept = {name: tuple(d.width for d in index) for name, index in tensor_indices(graph, HALF).items()}
    assert {name: kept[name] for name in widths} == widths
    images = torch.randn(3, 3, 6, 6)
    for mode in (True, False):
        assert torch.equal(extract(graph, network, Config.full_network()).train(mode)(images), network(images))
    for full_depth in range(graph.depth + 1):
        config = Config(freeze_depth=max(0, full_depth - 1), full_depth=full_depth, head_scale=0.5)
        sub = extract(graph, network, config)
        sub(images).sum().backward()
        assert all(p.grad is not None for p in sub.parameters() if p.requires_grad)


class NormWithActivation(nn.BatchNorm2d):
    """A batch norm that is called as a function."""

    def forward(self, x):
        statistics = (self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return F.relu(F.batch_norm(x, *statistics, self.momentum, self.eps))


def test_norms_called_as_functions_are_static_or_frozen_as_others_are():
    network = Net(
        lambda n, x: n.fc(pooled(n.two(n.b(n.one(n.a(x)))))),
        a=conv(3, 8), one=NormWithActivation(8), b=conv(8, 8), two=NormWithActivation(8), fc=nn.Linear(8, 5),
    )  # fmt: skip
    graph, images = trace(network, (3, 6, 6)), torch.randn(4, 3, 6, 6)
    config = Config(freeze_depth=1, full_depth=2, head_scale=1.0)
    running = extract(graph, network, config, "running").train()
    running(images)
    assert torch.equal(running.one.running_mean, network.one.running_mean)
    assert not torch.equal(running.two.running_mean, network.two.running_mean)
    static = extract(graph, network, config, "static")
    assert not any("running" in name for name in static.state_dict())
    assert torch.equal(static.train()(images), static.eval()(images))
    whole = extract(graph, network, Config.full_network(), "running").eval()
    assert torch.equal(whole(images), network.eval()(images))


class Variational(nn.Module):
    """In training alone a second layer adds noise."""

    def __init__(self):
        super().__init__()
        self.a, self.mean, self.spread = conv(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = pooled(self.a(x))
        z = self.mean(x)
        if self.training:
            z = z + torch.exp(self.spread(x)) * torch.randn_like(z)
        return self.fc(F.relu(self.b(z)))


@pytest.mark.parametrize("full_depth", range(4))
def test_evaluation_mode_has_the_units_and_widths_of_training(full_depth):
    graph = trace(Variational(), (3, 6, 6))
    assert graph.depth == 3
    sub = extract(graph, None, Config(freeze_depth=0, full_depth=full_depth, head_scale=0.5))
    for mode in (True, False):
        assert sub.train(mode)(torch.randn(2, 3, 6, 6)).shape == (2, 5)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def in_half_precision(n, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return n.fc(pooled(n.a(x)))


def hooked(n, x):
    x = n.a(x)
    x.requires_grad_()
    x.register_hook(lambda gradient: gradient * 0)
    return n.fc(pooled(x))


def assigning(n, x):
    x = n.a(x)
    joined = x.new_zeros(len(x), 16, 6, 6)
    joined[:, :8], joined[:, 8:] = x, x * 2
    return n.fc(pooled(joined)[:, :8])


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda n, x: n.fc(pooled(Sign.apply(n.a(x)))), "has a backward of its own"),
        (in_half_precision, "autocast"),
        (hooked, "puts a hook on a tensor"),
        (assigning, "concatenate instead"),
    ],
)
def test_what_would_be_lost_in_a_recording_is_refused(work, told):
    with pytest.raises(UnsupportedLayerError, match=told):
        trace(Net(work, a=conv(3, 8), fc=nn.Linear(8, 5)), (3, 6, 6))


def test_a_network_with_several_outputs_must_say_which_counts():
    network = Net(lambda n, x: {"logits": n.fc(pooled(n.a(x)))}, a=conv(3, 8), fc=nn.Linear(8, 5))
    with pytest.raises(InputError, match="say which output counts with an adapter"):
        trace(network, (3, 6, 6))
    assert trace(network, (3, 6, 6), Logits()).num_classes == 5


def test_scores_of_positions_want_an_adapter_that_says_what_they_are_held_against():
    network = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    with pytest.raises(InputError, match=r"gives \(N, 5, 6, 6\), not logits \(N, classes\); say .* with an adapter"):
        trace(network, (3, 6, 6))
    assert trace(network, (3, 6, 6), PerPixel()).num_classes == 5


class PerPixel(Adapter):
    metric = "mean_iou"

    def example_labels(self, batch_size, num_classes, input_shape):
        return torch.randint(num_classes, (batch_size, *input_shape[1:]))


class BothLosses(Logits):
    def loss(self, outputs, labels):
        return F.cross_entropy(outputs["logits"], labels) + F.cross_entropy(outputs["side"], labels)


def test_a_loss_that_wants_a_dropped_output_is_told_so():
    graph = trace(AuxiliaryHead(), (3, 6, 6), BothLosses())
    frozen = Config(freeze_depth=1, full_depth=2, head_scale=0.5)
    with pytest.raises(InputError, match=r"BothLosses.loss: .* NoneType; an output that is not in a sub-model is None"):
        measure(extract(graph, None, frozen), StepSpec(batch_size=4, threads=1))


class Misspelt(BothLosses):
    def loss(self, outputs, labels):
        return F.cross_entropi(outputs["logits"], labels)


def test_another_mistake_in_a_loss_keeps_its_own_error():
    graph = trace(AuxiliaryHead(), (3, 6, 6), Misspelt())
    with pytest.raises(AttributeError, match="cross_entropi"):
        measure(extract(graph, None, Config.full_network()), StepSpec(batch_size=4, threads=1))


class OwnStep(Adapter):
    def num_classes(self, model):
        return 5

    def step_loss(self, model, images, labels):
        return F.cross_entropy(model(images).mean((2, 3)), labels)


def test_an_adapter_that_takes_the_step_may_have_any_scores():
    network = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    assert trace(network, (3, 6, 6), OwnStep()).num_classes == 5
    silent = type("Silent", (Adapter,), {"num_classes": lambda self, model: 5})
    with pytest.raises(InputError, match="not logits"):
        trace(network, (3, 6, 6), silent())
