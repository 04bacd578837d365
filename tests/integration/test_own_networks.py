"""Networks of all kinds through the commands: the user's own, segmentation, detection, timm's."""

import copy
import gc
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import slt_planner as slt
from slt_planner.federated.run_folder import load_run
from slt_planner.graph.trace import trace
from slt_planner.models.registry import load_model
from slt_planner.planning.plan import load_plan
from slt_planner.submodel.extract import extract

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_cameras.py"
NETWORK = "./two_cameras.py:TwoCameras"
PLAN = ("slt-plan", NETWORK, "--input-shape", "2,16,16", "--batch-size", "16")
TRAIN = ("slt-train", "--plan", "plan.json", "--clients", "4", "--cohort-size", "2", "--local-batch", "16")


@pytest.fixture
def own(command, tmp_path):
    shutil.copy(EXAMPLE, tmp_path / "two_cameras.py")
    return command


def test_a_users_file_is_planned_and_trained(own, tmp_path):
    """Grouped convolutions, two inputs, a dict of outputs, a loss of its own."""
    planned = own(*PLAN, "--budgets", "5,10MB")
    assert planned.code == 0, planned.err
    plan = load_plan(tmp_path / "plan.json")
    assert plan.model.name == NETWORK
    assert plan.model.unit_names == ("eye.0", "eye.3", "both.0")
    assert [tier.status for tier in plan.tiers] == ["scheduled", "full"]
    for tier in plan.tiers:
        assert all(stage.measured_peak_bytes <= tier.budget_bytes for stage in tier.stages)
        assert all(proof.measured_peak_bytes > tier.budget_bytes for proof in tier.proofs)

    refused = own(*TRAIN, "--rounds", "9")
    assert refused.code == 2
    assert "the plan's model is your own code" in refused.err
    assert f"--model {NETWORK}" in refused.err

    rounds = max(2, len(plan.stages))
    few = ("--clients", "50", "--cohort-size", "2")
    trained = own(*TRAIN, "--model", NETWORK, "--rounds", str(rounds), *few, "--out", "run")
    assert trained.code == 0, trained.err
    result = load_run(tmp_path / "run")
    assert len(result.rows) == rounds
    assert all(row.refused == 0 and row.loss is not None for row in result.rows)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("./two_cameras.py:TwoCameras",), "--input-shape is needed"),
        (("./nowhere.py:Net", "--input-shape", "2,16,16"), "there is no file nowhere.py"),
        (("./two_cameras.py:Net", "--input-shape", "2,16,16"), "has no 'Net'"),
        (("./two_cameras.py:F", "--input-shape", "2,16,16"), "not a class or function"),
        (("./two_cameras.py:LeftAndRight", "--input-shape", "2,16,16"), "gives LeftAndRight, not a torch.nn.Module"),
        (("./broken.py:Net", "--input-shape", "2,16,16"), "broken.py cannot be run: ZeroDivisionError"),
        (("no_such_package.nets:make", "--input-shape", "2,16,16"), "cannot import no_such_package.nets"),
        (("./two_cameras.py:TwoCameras", "--input-shape", "3,16,16"), "does not take inputs of 1x16x16 and 2x16x16"),
    ],
)
def test_references_that_lead_nowhere_are_told_in_one_line(own, tmp_path, words, told):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    done = own("slt-plan", *words, "--budgets", "1MB")
    assert done.code == 2
    assert told in done.err
    assert len(done.err.splitlines()) == 1


def test_a_factory_in_a_package_beside_the_working_directory(own, tmp_path):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "mine.py").write_text("from two_cameras import TwoCameras\ndef cat(): return TwoCameras(7)\n")
    words = ("slt-plan", "nets.mine:cat", "--input-shape", "2,16,16", "--batch-size", "4", "--budgets", "1GB")
    done = own(*words)
    assert done.code == 0
    assert "nets.mine:cat: foresaw" in done.err  # not a picture of one
    assert load_plan(tmp_path / "plan.json").num_classes == 7
    assert "takes no num_classes" in own(*words, "--num-classes", "3", "--force").err


def test_as_many_classes_as_asked_for_and_another_network_is_told_apart(own, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes=4):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(4, num_classes))\n"
        "def fewer(): return net(7)\n"
    )
    words = ("--input-shape", "1,8,8", "--num-classes", "10", "--batch-size", "16", "--budgets", "1GB")
    assert own("slt-plan", "./mine.py:net", *words).code == 0
    train = ("slt-train", "--plan", "plan.json", "--rounds", "1", "--out", "run")
    other = own(*train, "--model", "./mine.py:fewer")
    assert "the model is not the plan's: it has 7 classes, planned was one of 10" in other.err
    done = own(*train, "--model", "./mine.py:net")
    assert done.code == 0, done.err


def write_masks(folder, split, count, size=64):
    """Images with one bright square, whose pixels are of class 1; a border that does not count."""
    random = np.random.default_rng(count)
    for kind in ("images", "masks"):
        (folder / split / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        x, y = random.integers(0, size // 2, 2)
        pixels = random.integers(0, 90, (size, size, 3), dtype=np.uint8)
        mask = np.zeros((size, size), dtype=np.uint8)
        pixels[y : y + size // 2, x : x + size // 2] += 120
        mask[y : y + size // 2, x : x + size // 2] = 1
        mask[0] = 255
        Image.fromarray(pixels).save(folder / split / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / split / "masks" / f"{number}.png")


@pytest.mark.slow
def test_a_segmentation_network_is_planned_and_trained_and_judged_by_mean_iou(command, tmp_path):
    write_masks(tmp_path / "squares", "train", 16)
    write_masks(tmp_path / "squares", "test", 6)
    shape = ("--input-shape", "3,64,64", "--num-classes", "2", "--batch-size", "4")
    planned = command("slt-plan", "lraspp_mobilenet_v3_large", *shape, "--budgets", "1GB")
    assert planned.code == 0, planned.err
    words = ("--dataset", "masks:squares", "--clients", "2", "--cohort-size", "2", "--rounds", "2", "--out", "run")
    trained = command("slt-train", "--plan", "plan.json", *words)
    assert trained.code == 0, trained.err
    assert "mean iou" in trained.err
    assert "Test mean IoU on" in trained.out
    result = load_run(tmp_path / "run")
    assert result.metric == "mean_iou"
    assert all(0 <= row.accuracy <= 1 and row.loss is not None for row in result.rows)
    assert "Mean IoU on" in (tmp_path / "run" / "report.html").read_text()


PIXELS = """
from torch import nn
import slt_planner as slt

class Pixels(slt.Adapter):
    metric = "mean_iou"

class Net(nn.Sequential):
    slt_adapter = Pixels()

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
"""


def test_an_adapter_for_pixels_needs_no_more_than_its_metric(command, tmp_path):
    (tmp_path / "pixels.py").write_text(PIXELS)
    write_masks(tmp_path / "squares", "train", 8, 16)
    write_masks(tmp_path / "squares", "test", 4, 16)
    shape = ("--input-shape", "3,16,16", "--batch-size", "4", "--budgets", "1GB")
    assert command("slt-plan", "./pixels.py:Net", *shape).code == 0
    words = ("--dataset", "masks:squares", "--clients", "2", "--rounds", "1", "--out", "run")
    trained = command("slt-train", "--plan", "plan.json", "--model", "./pixels.py:Net", *words)
    assert trained.code == 0, trained.err
    assert "Test mean IoU on" in trained.out


@pytest.mark.slow
def test_a_detector_is_planned_by_measurement_and_says_that_it_depends_on_data(command, tmp_path):
    done = command(
        *("slt-plan", "ssdlite320_mobilenet_v3_large", "--input-shape", "3,160,160"),
        *("--batch-size", "2", "--num-classes", "5", "--budgets", "2GB"),
    )
    assert done.code == 0, done.err
    assert "shapes depend on data" in done.out
    plan = load_plan(tmp_path / "plan.json")
    assert plan.model.data_dependent
    assert plan.num_classes == 5
    assert "shapes depend on data" in (tmp_path / "reports" / "plan.html").read_text()
    refused = command("slt-train", "--plan", "plan.json")
    assert refused.code == 2
    assert "can be planned and measured, not trained" in refused.err


def test_a_detectors_sub_model_is_the_detector_with_a_narrow_backbone():
    torch.manual_seed(0)
    model = load_model("ssdlite320_mobilenet_v3_large", 5, (3, 64, 64)).train()
    graph = trace(model, (3, 64, 64))
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = graph.adapter.example_labels(2, 5, (3, 64, 64))
    whole = extract(graph, model, slt.Config.full_network(), norms="running")
    losses = []
    for network in (whole, model):
        torch.manual_seed(1)
        losses.append(network(images, targets))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[1])
    config = slt.Config(freeze_depth=3, full_depth=4, head_scale=0.25)
    narrow = extract(graph, model, config)
    heads = [name for name, _ in narrow.named_parameters() if name.startswith("head.")]
    assert {name: p.shape for name, p in narrow.named_parameters() if name in heads} == {
        name: p.shape for name, p in model.named_parameters() if name in heads
    }
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())
    sum(narrow(images, targets).values()).backward()
    spec = slt.StepSpec(batch_size=2)
    peaks = {slt.measure(extract(graph, None, config), spec, details=False).peak_bytes for _ in range(3)}
    assert len(peaks) == 1  # values are made up, but always the same
    merged = slt.merge(graph, model.state_dict(), [(config, narrow.trained_state(), 2)])
    assert merged.keys() == model.state_dict().keys()


def test_a_detectors_sub_model_goes_when_nobody_uses_it():
    model = load_model("ssdlite320_mobilenet_v3_large", 5, (3, 64, 64))
    graph = trace(model, (3, 64, 64))
    sub = extract(graph, None, slt.Config(freeze_depth=3, full_depth=4, head_scale=0.25))
    images, targets = list(torch.rand(2, 3, 64, 64)), graph.adapter.example_labels(2, 5, (3, 64, 64))
    gc.disable()  # in a reference cycle it would wait for the garbage collector, and a plan needs hundreds
    try:
        used = copy.deepcopy(sub)
        sum(used(images, targets).values()).backward()
        gone = [weakref.ref(sub), weakref.ref(used)]
        del sub, used
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_timm_networks_by_name():
    pytest.importorskip("timm")
    model = load_model("timm:mobilenetv3_small_050", 10)
    graph = trace(model, (3, 64, 64))
    images = torch.randn(2, 3, 64, 64)
    sub = extract(graph, model, slt.Config.full_network(), norms="running").eval()
    assert torch.equal(sub(images), model.eval()(images))
    with pytest.raises(slt.InputError, match="did you mean resnet50"):
        load_model("timm:resnet_50")
