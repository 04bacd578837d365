"""`slt profile` end to end: what it prints, what it writes, and how it refuses."""

import json
import os

import pytest
from PIL import Image

from slt_planner.memory.profile import MemoryProfile, load_profile
from slt_planner.reporting.profile_view import fine_bytes, short

STEP = ("--batch-size", "4", "--threads", "1")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """What is learned of operators goes to a folder of this file's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_step_is_measured_and_predicted_and_kept(command, tmp_path):
    done = command("slt", "profile", "resnet20", "--config", "4,5,0.5", *STEP)
    assert done.code == 0, done.err
    assert done.err == ""
    path = tmp_path / "profiles" / "resnet20-4-5-0.5-b4.json"
    profile = load_profile(path)
    assert (profile.model, str(profile.config), profile.source) == ("resnet20", "(4, 5, 0.5)", "MEASURED")
    assert (profile.spec.batch_size, profile.spec.threads, profile.environment["threads"]) == (4, 1, "1")
    assert profile.timeline
    assert Image.open(path.with_suffix(".png")).size == (1600, 960)
    assert sorted(path.parent.iterdir()) == [path, path.with_suffix(".png")]
    lines = done.out.splitlines()
    assert lines[0].startswith(f"resnet20 (4, 5, 0.5): {fine_bytes(profile.peak_bytes)} at the peak")
    assert sum(line.startswith(f"Predicted {fine_bytes(profile.peak_bytes)} (0.00 % off") for line in lines) == 1
    assert [line.split()[0] for line in lines if " Conv2d " in line] == [
        "1f",
        "2f",
        "3f",
        "4f",
        *map(str, range(5, 20)),
    ]
    total = next(line for line in lines if line.strip().startswith("all"))
    assert total.split()[1] == short(sum(unit.weights_bytes for unit in profile.units))
    assert lines[-1].startswith("Written: profiles/resnet20-4-5-0.5-b4.json, profiles/resnet20-4-5-0.5-b4.png")
    assert all(len(line) <= 80 for line in lines[:-1])


def test_micro_batches_are_named_with_the_batch(command, tmp_path):
    done = command("slt", "profile", "convnet", *STEP, "--micro-batch", "2")
    assert done.code == 0, done.err
    assert load_profile(tmp_path / "profiles" / "convnet-0-0-1-b4.json").spec.micro_batch == 2
    assert "batch 4 in micro-batches of 2, fp32" in done.out
    refused = command("slt", "profile", "convnet", *STEP, "--micro-batch", "5", "--force")
    assert (refused.code, refused.err) == (2, "slt: error: micro-batches of 5 in a batch of 4: use at most that\n")


def test_a_step_is_profiled_with_levers(command, tmp_path):
    done = command("slt", "profile", "resnet20", "--config", "1,2,0.25", *STEP, "--levers", "exact")
    assert done.code == 0, done.err
    lean = load_profile(tmp_path / "profiles" / "resnet20-1-2-0.25-b4-exact.json")
    assert len(lean.spec.levers) == 6
    assert lean.spec.memory_format == "channels_last"
    assert "Predicted" in done.out
    assert "(0.00 % off" in done.out
    assert command("slt", "profile", "resnet20", "--config", "1,2,0.25", *STEP).code == 0
    assert lean.peak_bytes < load_profile(tmp_path / "profiles" / "resnet20-1-2-0.25-b4.json").peak_bytes
    refused = command("slt", "profile", "resnet20", *STEP, "--levers", "auto")
    assert refused.code == 2
    assert refused.err.startswith("slt: error: --levers auto is for planning")


def test_nothing_is_overwritten_unless_forced_and_that_is_said_at_once(command, tmp_path):
    (tmp_path / "profile.png").write_text("mine")
    words = ("slt", "profile", "resnet20", *STEP, "--no-measure", "--out", "profile.json")
    refused = command(*words)
    assert refused.code == 2
    assert refused.err == "slt: error: profile.png exists; choose another name, or --force to overwrite it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["profile.png"]
    assert (tmp_path / "profile.png").read_text() == "mine"
    forced = command(*words, "--force")
    assert forced.code == 0, forced.err
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_a_prediction_needs_no_step(command, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a step is measured")

    monkeypatch.setattr("slt_planner.memory.measure.measure", refuse)
    done = command("slt", "profile", "resnet20", *STEP, "--no-measure", "--out", "p.json", "--picture", "q.png")
    assert done.code == 0, done.err
    assert "Predicted: allocator ruler" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "q.png"}
    saved = json.loads((tmp_path / "p.json").read_text())
    assert (saved["source"], saved["model"], saved["exact"]) == ("PREDICTED", "resnet20", True)


def test_units_can_be_whole_blocks(command, tmp_path):
    words = ("slt", "profile", "resnet20", *STEP, "--config", "3,4,0.5", "--granularity")
    done = command(*words, "block", "--process")
    assert done.code == 0, done.err
    profile = load_profile(tmp_path / "profiles" / "resnet20-block-3-4-0.5-b4.json")
    residuals = [f"group{group}.{i}" for group in (1, 2, 3) for i in range(3)]
    assert [unit.name for unit in profile.units] == ["conv", *residuals, "classifier"]
    assert [unit.gradients_bytes > 0 for unit in profile.units] == [False] * 3 + [True] * 8
    assert profile.process.peak_bytes > profile.process.before_bytes
    beyond = command(*words[:5], "--config", "10,11,0.5", "--granularity", "block")
    assert "beyond the network's 10 units" in beyond.err
    refused = command(*words, "stage")
    assert (refused.code, refused.err) == (2, "slt: error: --granularity 'stage': known are layer, block\n")


def test_a_saved_prediction_can_be_read_back(command, tmp_path):
    done = command("slt", "profile", "convnet", *STEP, "--no-measure", "--out", "p.json")
    assert done.code == 0, done.err
    assert load_profile("p.json").source == "PREDICTED"
    shown = command("slt", "profile", "p.json")
    assert shown.code == 0, shown.err
    assert shown.out == done.out[: done.out.index("Written")]


def test_configurations_and_saved_profiles_are_compared(command, tmp_path):
    words = ("slt", "profile", "convnet", *STEP)
    together = command(*words, "--compare", "1,2,0.5", "--out", "a.json")
    assert together.code == 0, together.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.json",
        "a.png",
    ]  # what it is held against is not kept
    assert command(*words, "--config", "1,2,0.5", "--out", "b.json").code == 0
    before = sorted(tmp_path.iterdir())
    saved = command("slt", "profile", "a.json", "--compare", "b.json")
    assert saved.code == 0, saved.err
    assert sorted(tmp_path.iterdir()) == before
    a, b = load_profile("a.json"), load_profile("b.json")
    peaks = f"{fine_bytes(a.peak_bytes)} {fine_bytes(b.peak_bytes)} {fine_bytes(b.peak_bytes - a.peak_bytes, True)}"
    for out in (together.out, saved.out):
        peak = next(line for line in out.splitlines() if line.startswith("peak"))
        assert " ".join(peak.split()).startswith(f"peak {peaks} ")
        assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("Written"))


def test_json_goes_to_stdout_alone(command, tmp_path):
    words = ("slt", "profile", "convnet", *STEP, "--json")
    one = command(*words, "--out", "a.json")
    assert one.code == 0, one.err
    assert one.out == (tmp_path / "a.json").read_text()
    assert "at the peak" in one.err
    assert "Written: a.json" in one.err
    several = command(*words, "--out", "b.json", "--compare", "0,0,0.5", "--compare", "a.json")
    profiles = [MemoryProfile.model_validate(entry) for entry in json.loads(several.out)]
    assert [str(profile.config) for profile in profiles] == ["(0, 0, 1)", "(0, 0, 0.5)", "(0, 0, 1)"]
    assert profiles[2] == load_profile("a.json")


def test_a_process_of_its_own_is_kept_and_shown(command, tmp_path):
    done = command("slt", "profile", "convnet", *STEP, "--process", "--out", "p.json")
    assert done.code == 0, done.err
    process = load_profile("p.json").process
    assert 0 < process.before_bytes <= process.peak_bytes
    assert f"In a process of its own: {fine_bytes(process.peak_bytes)} resident" in done.out


def test_a_network_whose_shapes_depend_on_data_is_measured_alone(command, tmp_path):
    words = ("slt", "profile", "fasterrcnn_mobilenet_v3_large_320_fpn", "--batch-size", "1", "--threads", "1")
    words += ("--input-shape", "3,64,64", "--num-classes", "3")
    done = command(*words, "--out", "d.json")
    assert done.code == 0, done.err
    assert "Not predicted. This network's shapes depend on data" in done.out
    refused = command(*words, "--out", "e.json", "--no-measure")
    assert refused.code == 2
    assert "depend on data" in refused.err
    assert not (tmp_path / "e.json").exists()


def test_a_network_of_ones_own_gets_a_name_that_is_a_file_name(command, tmp_path):
    network = "nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2))"
    (tmp_path / "my nets.py").write_text(f"from torch import nn\n\n\ndef make():\n    return {network}\n")
    done = command("slt", "profile", "./my nets.py:make", *STEP, "--input-shape", "3,8,8", "--optimizer", "adam")
    assert done.code == 0, done.err
    assert (tmp_path / "profiles" / "my-nets.py-make-0-0-1-b4.json").exists()
    assert "./my nets.py:make (0, 0, 1): " in done.out
    assert "fp32, Adam." in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet21"], "unknown model 'resnet21'; did you mean resnet"),
        (["resnet20", "--config", "4,5"], "--config '4,5': give two whole numbers and a scale up to 1"),
        (["resnet20", "--config", "4,5,0.5,1"], "--config '4,5,0.5,1': give two whole numbers"),
        (["resnet20", "--config", "a,5,0.5"], "--config 'a,5,0.5': give two whole numbers"),
        (["resnet20", "--config", "4,5.5,0.5"], "--config '4,5.5,0.5': give two whole numbers"),
        (["resnet20", "--config", "5,5,0.5"], "--config 5,5,0.5: freeze_depth 5 must be below full_depth 5"),
        (["resnet20", "--config", "4,5,1.5"], "--config 4,5,1.5: head_scale: Input should be less than or equal to 1"),
        (["resnet20", "--config", "4,5,0"], "--config 4,5,0: head_scale: "),
        (["resnet20", "--config", "0,0,nan"], "--config 0,0,nan: head_scale: "),
        (["resnet20", "--config", "-1,0,1"], "--config -1,0,1: freeze_depth: "),
        (["resnet20", "--compare", "4,5"], "--compare '4,5': give two whole numbers"),
        (["resnet20", "--compare", "none.json"], "profile none.json: cannot be read"),
        (["resnet20", "--config", "4,50,0.5"], "full_depth is beyond the network's 19 units"),
        (["resnet20", "--compare", "4,50,0.5"], "full_depth is beyond the network's 19 units"),
        (["none.json"], "profile none.json: cannot be read (No such file or directory); make one with slt profile"),
        (["bad.json"], "profile bad.json: not JSON (line 1"),
        (["bare.json", "--picture", "x.png"], "bare.json has no timeline"),
        (["bare.json", "--compare", "4,5,0.5"], "--compare 4,5,0.5: a saved profile is compared with other saved ones"),
        (["bare.json", "--batch-size", "4"], "--batch-size is for a step that is yet to be made, not for a saved"),
        (["bare.json", "--out", "x.json"], "--out is for a step that is yet to be made"),
        (["resnet20", "--batch-size", "0"], "--batch-size 0: "),
        (["resnet20", "--optimizer", "lion"], "--optimizer lion: "),
        (["resnet20", "--momentum", "2"], "--momentum 2.0: "),
        (["resnet20", "--precision", "fp8"], "--precision fp8: "),
        (["resnet20", "--norms", "none"], "--norms none: "),
        (["resnet20", "--device", "tpu"], "--device tpu: "),
        (["resnet20", "--input-shape", "3,x"], "--input-shape '3,x': give positive whole"),
        (["./x.py:Net"], "--input-shape is needed"),
        (["resnet20", "--process", "--no-measure"], "--process runs the step and --no-measure does not"),
        (["resnet20", "--out", "x.txt"], "x.txt: must end in .json"),
        (["resnet20", "--picture", "x.jpg"], "x.jpg: must end in .png"),
        (["resnet20", "--out", "/proc/no/x.json"], "/proc/no/x.json: cannot be written"),
        ([], "Missing argument"),
    ],
)
def test_slt_profile_refuses_in_one_line(command, tmp_path, words, message):
    (tmp_path / "bad.json").write_text("{")
    bare = MemoryProfile(peak_bytes=0, peak_operator="x", device="cpu", batch_size=1, breakdown={})
    bare.save(tmp_path / "bare.json")
    before = sorted(os.listdir(tmp_path))
    done = command("slt", "profile", *words)
    assert done.code == 2
    assert done.err.startswith("slt: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert sorted(os.listdir(tmp_path)) == before


def test_a_saved_profile_of_nothing_can_be_shown(command, tmp_path):
    MemoryProfile(peak_bytes=0, peak_operator="x", device="cpu", batch_size=1, breakdown={}).save(tmp_path / "a.json")
    done = command("slt", "profile", "a.json", "--compare", "a.json")
    assert done.code == 0, done.err
    assert command("slt", "profile", "a.json").code == 0
