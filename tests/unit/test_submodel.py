"""extract and merge against a network cut by hand, and against themselves."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slt_planner.config import Config
from slt_planner.errors import InputError
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.submodel.extract import extract
from slt_planner.submodel.merge import merge
from tests.reference_resnet import HandCutResNet

torch.manual_seed(0)
MODEL = load_model("resnet20")
GRAPH = trace(MODEL, (3, 32, 32))
PAD_MODEL = load_model("resnet20_pad")
PAD_GRAPH = trace(PAD_MODEL, (3, 32, 32))
IMAGES = torch.randn(4, 3, 32, 32)
LABELS = torch.tensor([0, 3, 9, 1])


@st.composite
def configs(draw, depth=19):
    full_depth = draw(st.integers(0, depth))
    freeze_depth = draw(st.integers(0, max(0, full_depth - 1)))
    head_scale = draw(st.integers(1, 64)) / 64
    return Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale)


def random_configs(count):
    random = np.random.default_rng(7)
    found = []
    for _ in range(count):
        full_depth = int(random.integers(0, 20))
        freeze_depth = int(random.integers(0, max(1, full_depth)))
        head_scale = int(random.integers(1, 65)) / 64
        found.append(Config(freeze_depth=freeze_depth, full_depth=full_depth, head_scale=head_scale))
    return found


@pytest.mark.parametrize("config", random_configs(30), ids=str)
def test_outputs_and_gradients_equal_those_of_a_network_cut_by_hand(config):
    sub = extract(GRAPH, MODEL, config)
    reference = HandCutResNet.of_resnet20(MODEL, **config.model_dump())

    logits, expected = sub(IMAGES), reference(IMAGES)
    assert torch.equal(logits, expected)
    F.cross_entropy(logits, LABELS).backward()
    F.cross_entropy(expected, LABELS).backward()
    own = dict(sub.named_parameters())
    for layer, name, number in reference.pairs():
        for key, parameter in layer.named_parameters():
            gradient = own[f"{name}.{key}"].grad
            frozen = 0 < number <= config.freeze_depth
            assert (gradient is None) == frozen
            assert frozen or torch.equal(gradient, parameter.grad), f"{name}.{key}"


@pytest.mark.parametrize("norms", ["static", "running"])
@pytest.mark.parametrize(("model", "graph"), [(MODEL, GRAPH), (PAD_MODEL, PAD_GRAPH)], ids=["conv", "pad"])
def test_the_full_configuration_is_the_model_to_the_bit(model, graph, norms):
    sub, whole = extract(graph, model, Config.full_network(), norms), copy.deepcopy(model).train()
    assert torch.equal(sub(IMAGES), whole(IMAGES))
    if norms == "running":
        assert torch.equal(sub.eval()(IMAGES), whole.eval()(IMAGES))
    for name, value in sub.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])


@given(config=configs(), norms=st.sampled_from(["static", "running"]))
@settings(max_examples=30, deadline=None)
def test_merging_untouched_sub_models_is_the_identity(config, norms):
    for model, graph in ((MODEL, GRAPH), (PAD_MODEL, PAD_GRAPH)):
        state = model.state_dict()
        part = extract(graph, model, config, norms).trained_state()
        merged = merge(graph, state, [(config, part, 3), (config, part, 500)])
        assert merged.keys() == state.keys()
        assert all(torch.equal(merged[name], state[name]) for name in state)


@given(config=configs())
@settings(max_examples=10, deadline=None)
def test_extraction_leaves_the_model_alone_and_shares_nothing(config):
    before = copy.deepcopy(MODEL.state_dict())
    sub = extract(GRAPH, MODEL, config)
    with torch.no_grad():
        for parameter in sub.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(before[name], value) for name, value in MODEL.state_dict().items())


@given(config=configs())
@settings(max_examples=20, deadline=None)
def test_frozen_units_are_those_up_to_freeze_depth(config):
    sub = extract(GRAPH, None, config)
    units = GRAPH.unit_of_tensor()
    for name, parameter in sub.named_parameters():
        assert parameter.requires_grad == (units[name] > config.freeze_depth)
    assert set(sub.trained_state()) == {name for name, p in sub.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", random_configs(8), ids=str)
def test_the_parameter_free_shortcut_at_any_width_is_the_network_built_at_that_width(config):
    """Channel i of the narrow shortcut meets channel i of the block, and the rest are zeros."""
    sub = extract(PAD_GRAPH, PAD_MODEL, config)
    outputs = {}
    for fqn in ("group2.0.bn2", "group2.0.shortcut"):
        sub.get_submodule(fqn).register_forward_hook(lambda m, i, o, fqn=fqn: outputs.update({fqn: (i[0], o)}))
    sub(IMAGES)
    x, padded = outputs["group2.0.shortcut"]
    block = outputs["group2.0.bn2"][1]
    kept = min(x.shape[1], padded.shape[1])
    assert padded.shape[1] >= block.shape[1]
    assert torch.equal(padded[:, :kept], x[:, :kept, ::2, ::2])
    assert not padded[:, kept:].any()


def test_merge_averages_each_element_over_the_clients_that_trained_it():
    """Three clients of different widths and weights, against a sum written out entry by entry."""
    state = {name: value.double() if value.is_floating_point() else value for name, value in MODEL.state_dict().items()}
    chosen = [
        Config(freeze_depth=0, full_depth=0, head_scale=0.25),
        Config(freeze_depth=2, full_depth=3, head_scale=0.5),
        Config(freeze_depth=17, full_depth=19, head_scale=1.0),
    ]
    samples = [10, 30, 7]
    updates = []
    for config, count in zip(chosen, samples, strict=True):
        part = extract(GRAPH, state, config).trained_state()
        updates.append((config, {name: value + torch.randn_like(value) for name, value in part.items()}, count))
    merged = merge(GRAPH, state, iter(updates))

    for name in ("conv.weight", "group1.1.conv2.weight", "group3.2.conv2.weight", "fc.weight", "fc.bias"):
        old = state[name]
        expected = old.clone()
        for entry in np.ndindex(*old.shape):
            holders = [
                (part[name][entry], count)
                for _, part, count in updates
                if name in part and all(i < size for i, size in zip(entry, part[name].shape, strict=True))
            ]
            if holders:
                moved = sum(count * float(value - old[entry]) for value, count in holders)
                expected[entry] = old[entry] + moved / sum(count for _, count in holders)
        torch.testing.assert_close(merged[name], expected, rtol=1e-12, atol=1e-12)


def test_merge_refuses_what_does_not_belong():
    config = Config(freeze_depth=4, full_depth=5, head_scale=0.5)
    state = MODEL.state_dict()
    part = extract(GRAPH, MODEL, config).trained_state()
    with pytest.raises(InputError, match="does not train"):
        merge(GRAPH, state, [(config, {"conv.weight": state["conv.weight"]}, 1)])
    with pytest.raises(InputError, match="does not have"):
        merge(GRAPH, state, [(config, {"elsewhere.weight": state["conv.weight"]}, 1)])
    with pytest.raises(InputError, match=r"fc.weight has shape \(10, 64\); it must be \(10, 32\)"):
        merge(GRAPH, state, [(config, {**part, "fc.weight": state["fc.weight"]}, 1)])
    with pytest.raises(InputError, match="0 samples"):
        merge(GRAPH, state, [(config, part, 0)])


def test_extract_refuses_another_network_and_a_depth_that_is_not_there():
    with pytest.raises(InputError, match="is not the network that was traced"):
        extract(GRAPH, load_model("resnet20_pad"), Config.full_network())
    with pytest.raises(InputError, match=r"conv.weight has shape"):
        extract(GRAPH, {**MODEL.state_dict(), "conv.weight": torch.zeros(1)}, Config.full_network())
    with pytest.raises(InputError, match="beyond the network's 19 units"):
        extract(GRAPH, MODEL, Config(freeze_depth=0, full_depth=20, head_scale=0.5))


def test_running_norms_of_frozen_units_stay_as_they_are():
    config = Config(freeze_depth=5, full_depth=6, head_scale=0.5)
    sub = extract(GRAPH, MODEL, config, norms="running").train()
    sub(IMAGES)
    assert torch.equal(sub.bn.running_mean, MODEL.bn.running_mean)
    before, after = (m.get_submodule("group3.0.bn1").running_mean[:32] for m in (MODEL, sub))
    assert not torch.equal(before, after)


def test_a_copied_sub_model_is_its_own():
    sub = extract(GRAPH, MODEL, Config(freeze_depth=0, full_depth=2, head_scale=0.5))
    expected = sub(IMAGES)
    other = copy.deepcopy(sub)
    with torch.no_grad():
        for parameter in sub.parameters():
            parameter.zero_()
    assert torch.equal(other(IMAGES), expected)
