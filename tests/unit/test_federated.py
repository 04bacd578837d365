"""Federated runs against a plain loop, and what they leave behind."""

import copy
import json
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from slt_planner.config import Config, StepSpec, Tier
from slt_planner.data.datasets import Dataset, normalise
from slt_planner.data.partition import partition
from slt_planner.errors import BudgetExceeded, InfeasibleError, InputError
from slt_planner.federated.client import LocalTraining, client_seed, learning_rate, train_client
from slt_planner.federated.engines.local import SentModels, train_assignment
from slt_planner.federated.evaluate import evaluate, split_without_tail
from slt_planner.federated.experiment import run_experiment, train
from slt_planner.federated.network_and_data import check_labels, check_lone_images
from slt_planner.federated.result import TIMING_FIELDS, RunSettings
from slt_planner.federated.rounds import draw_cohort, run_round
from slt_planner.federated.run_folder import RunFolder, clear_runs, load_run
from slt_planner.federated.setup import deal_clients, default_settings, load_network, prepare
from slt_planner.federated.strategies.base import ServerState
from slt_planner.federated.strategies.slt import SuccessiveLayerTraining
from slt_planner.graph.adapter import Adapter
from slt_planner.graph.trace import trace
from slt_planner.memory import recording
from slt_planner.memory.calibrate import calibrate
from slt_planner.memory.measure import measure
from slt_planner.memory.step import threads
from slt_planner.models.registry import load_model
from slt_planner.planning.solve import solve
from slt_planner.submodel.extract import extract
from tests.unit import tiny_runs
from tests.unit.tiny_runs import GRAPH, SPEC, network, prepared, run, settings_of


@pytest.fixture(scope="module")
def full_plan():
    return tiny_runs.full_plan()


@pytest.fixture(scope="module")
def scheduled_plan():
    return tiny_runs.scheduled_plan()


@pytest.fixture(scope="module")
def dataset():
    return tiny_runs.dataset()


def test_a_run_with_every_exact_lever_is_the_plain_run_but_for_rounding(full_plan, dataset, tmp_path):
    lean_plan = solve(GRAPH, ["1GB"], SPEC, levers="exact")
    assert "split_convolutions" in lean_plan.tiers[0].stages[0].levers
    for name, plan in (("plain", full_plan), ("lean", lean_plan)):
        run(plan, dataset, tmp_path / name, rounds=2)
    plain, lean = (load_file(tmp_path / name / "weights.safetensors") for name in ("plain", "lean"))
    for name, weight in plain.items():
        torch.testing.assert_close(lean[name], weight, rtol=1e-4, atol=1e-5)


def test_a_plan_of_full_tiers_is_plain_fedavg_to_the_bit(full_plan, dataset, tmp_path):
    """Twenty lines of FedAvg on the untouched network give the same weights."""
    run(full_plan, dataset, tmp_path / "run")
    torch.set_num_threads(1)
    weights = {k: v.clone() for k, v in network().state_dict().items()}
    parts = partition(dataset.train_labels, 5, "iid", 3)
    for number in range(1, 7):
        cohort = np.random.default_rng([3, 2, number]).choice(range(5), size=2, replace=False)
        total = {k: torch.zeros_like(v) for k, v in weights.items() if v.is_floating_point()}
        for client in cohort:
            model = network()
            model.load_state_dict(weights)
            optimizer = torch.optim.SGD(
                model.parameters(), lr=learning_rate(number, 6, 0.1, 0.01), momentum=0.9, weight_decay=1e-3
            )
            generator = torch.Generator().manual_seed(client_seed(3, number, int(client)))
            own = torch.as_tensor(parts[client])
            for chosen in own[torch.randperm(len(own), generator=generator)].split(8):
                optimizer.zero_grad()
                batch = normalise(dataset.train_images[chosen], dataset)
                F.cross_entropy(model(batch), dataset.train_labels[chosen]).backward()
                optimizer.step()
            for k, v in dict(model.named_parameters()).items():
                total[k] += (v.detach() - weights[k]) * len(own)
        count = sum(len(parts[client]) for client in cohort)
        weights = {k: v + total[k] / count if k in total else v for k, v in weights.items()}

    result = load_file(tmp_path / "run" / "weights.safetensors")
    for name, _ in network().named_parameters():
        assert torch.equal(result[name], weights[name]), name


def test_the_same_seed_gives_the_same_run(scheduled_plan, dataset, tmp_path):
    first = run(scheduled_plan, dataset, tmp_path / "a")
    second = run(scheduled_plan, dataset, tmp_path / "b")
    for one, two in zip(first.rows, second.rows, strict=True):
        assert one.model_dump(exclude=TIMING_FIELDS) == two.model_dump(exclude=TIMING_FIELDS)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    other = run(scheduled_plan, dataset, tmp_path / "c", seed=4)
    assert [r.accuracy for r in other.rows] != [r.accuracy for r in first.rows]


def test_a_run_follows_the_schedule_and_keeps_its_budgets(scheduled_plan, dataset, tmp_path):
    result = run(scheduled_plan, dataset, tmp_path / "run", rounds=12, clients=10, cohort_size=4)
    stages = [row.stage for row in result.rows]
    assert stages == sorted(stages)
    assert set(stages) == set(range(len(scheduled_plan.stages)))
    budgets = {tier.name: tier.budget_bytes for tier in scheduled_plan.tiers}
    for row in result.rows:
        planned = scheduled_plan.stages[row.stage]
        assert (row.config.full_depth, row.config.head_scale) == (planned.full_depth, planned.head_scale)
        assert set(row.measured_peak_bytes) == {"weak", "strong"}
        assert all(peak <= budgets[name] for name, peak in row.measured_peak_bytes.items())
        assert row.clients == 4
        assert row.bytes_down >= row.bytes_up > 0
    frame = result.frame()
    assert list(frame["accuracy"]) == [row.accuracy for row in result.rows]
    assert list(frame["config.head_scale"]) == [row.config.head_scale for row in result.rows]
    tiny, weak, strong = result.tiers
    assert (tiny.clients, tiny.takes_part) == (2, False)
    assert weak.clients == strong.clients == 4
    assert result.accuracy_running_statistics is not None


def test_the_small_network_is_the_widest_that_fits_the_weakest_tier(full_plan, dataset, tmp_path):
    peaks = {}
    for s in GRAPH.head_scales(0):
        config = Config(freeze_depth=0, full_depth=0, head_scale=s)
        peaks[s] = measure(extract(GRAPH, None, config), SPEC, details=False).peak_bytes
    for budget in (peaks[0.5], peaks[0.5] + 1, max(peaks.values()) - 1):
        full = full_plan.full_network.peak_bytes
        tiers = [Tier(name="weak", budget_bytes=budget, share=0.5), Tier(name="strong", budget_bytes=full, share=0.5)]
        result = run(solve(GRAPH, tiers, SPEC), dataset, tmp_path / str(budget), strategy="small", rounds=1)
        assert result.head_scale == max(s for s, peak in peaks.items() if peak <= budget)
        assert all(tier.takes_part for tier in result.tiers)


def test_a_run_folder_can_be_read_back_even_when_cut_short(scheduled_plan, dataset, tmp_path):
    result = run(scheduled_plan, dataset, tmp_path / "run")
    assert load_run(tmp_path / "run") == result
    with pytest.raises(InputError, match="exists; choose another name"):
        run(scheduled_plan, dataset, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-10])  # a crash in the middle of the last line
    assert load_run(tmp_path / "run").rows == result.rows[:-1]
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not a valid run"):
        load_run(tmp_path / "run")
    with pytest.raises(InputError, match="is it a run folder"):
        load_run(tmp_path)


def test_an_interrupt_leaves_a_readable_folder_with_weights(scheduled_plan, dataset, tmp_path):
    def stop_after_three(row):
        if row.round == 3:
            raise KeyboardInterrupt

    result = run_experiment(prepared(scheduled_plan, dataset), tmp_path / "run", progress=stop_after_three)
    assert result.status == "stopped"
    assert len(result.rows) == 3
    assert load_run(tmp_path / "run") == result
    with safe_open(tmp_path / "run" / "weights.safetensors", "pt") as file:
        assert Config.model_validate_json(file.metadata()["config"]) == result.rows[-1].config
        kept = file.get_tensor("1.running_mean")
    assert kept.abs().sum() > 0  # recalibrated, so that one image can be classified
    assert not list((tmp_path / "run").glob(".*"))


def test_an_update_that_is_not_finite_is_refused_and_the_round_goes_on(full_plan, dataset, tmp_path):
    result = run(full_plan, dataset, tmp_path / "run", rounds=2, learning_rate=1e38, final_learning_rate=1e38)
    assert all(row.refused == row.clients for row in result.rows)
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in network().named_parameters())
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is not JSON


def test_settings_that_do_not_go_together_are_refused(full_plan, scheduled_plan, dataset, tmp_path):
    cases = [
        ({"local_batch": 9}, "local batch 9 needs more memory than the plan's 8"),
        ({"cohort_size": 6}, "cohort size 6 is more than the 5 clients"),
        ({"rounds": 1}, "1 rounds for a schedule of"),
        ({"clients": 41, "cohort_size": 1}, "too few for 41 clients"),
        ({"partition": "dirichlet:x"}, "dirichlet:x"),
    ]
    for number, (change, words) in enumerate(cases):
        with pytest.raises(InputError) as caught:
            run(scheduled_plan, dataset, tmp_path / str(number), **change)
        assert words in str(caught.value)
        assert not (tmp_path / str(number)).exists()
    tiers = [
        tier.model_copy(update={"share": share})
        for tier, share in zip(scheduled_plan.tiers, (0.8, 0.1, 0.1), strict=True)
    ]
    with pytest.raises(InputError, match="none of the 1 clients is in a tier that takes part"):
        run(
            scheduled_plan.model_copy(update={"tiers": tuple(tiers)}), dataset, tmp_path / "x", clients=1, cohort_size=1
        )
    with pytest.raises(InputError, match="the model is not the plan's"):
        load_network(full_plan, 0, torch.nn.Sequential(*list(network())[:2], *list(network())[3:]))
    with pytest.raises(InputError, match="the plan names no model"):
        load_network(full_plan, 0)


class _OfPixels(Adapter):
    """Its loss takes pixels that do not count, and scores of a coarser grid."""

    metric = "mean_iou"

    def loss(self, outputs, labels):
        return F.cross_entropy(F.interpolate(outputs, labels.shape[-2:]), labels, ignore_index=255)

    def example_labels(self, batch_size, num_classes, input_shape):
        return torch.randint(num_classes, (batch_size, *input_shape[-2:]))


def test_labels_of_another_kind_than_the_networks_scores_are_refused(full_plan, dataset, tmp_path):
    masks = torch.zeros(len(dataset.train_labels), 16, 16, dtype=torch.uint8)
    of_pixels = replace(dataset, train_labels=masks, test_labels=masks[: len(dataset.test_labels)])
    words = r"made up: of 2 images the labels are \(2, 16, 16\), and the network's scores \(2, 3\); classes of images"
    with pytest.raises(InputError, match=words):
        run(full_plan, of_pixels, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_labels(GRAPH, dataset)

    per_pixel = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    graph = trace(per_pixel, (3, 16, 16), _OfPixels())
    check_labels(graph, of_pixels)
    with pytest.raises(InputError, match=r"labels are \(2,\), and the network's scores \(2, 3, 16, 16\)"):
        check_labels(graph, dataset)
    coarse = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 3, 1))
    with pytest.raises(InputError, match=r"labels are \(2, 16, 16\), and the network's scores \(2, 3, 8, 8\)"):
        check_labels(trace(coarse, (3, 16, 16), _OfPixels()), of_pixels)


class LoneValues(nn.Module):
    """Its second norm sees a value a channel and image, its first one sixteen."""

    def __init__(self):
        super().__init__()
        self.conv, self.wide = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4)
        self.hidden, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.last, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.wide(self.conv(x)).relu().mean((2, 3))
        x = self.norm(self.hidden(x)).relu()
        return self.classifier(self.last(x).relu())


@pytest.mark.parametrize("norms", ["static", "running"])
def test_a_norm_that_would_see_one_value_is_refused_before_anything_is_trained(dataset, norms):
    model = LoneValues()
    graph = trace(model, (3, 16, 16))
    plan = solve(graph, ["1GB"], SPEC.model_copy(update={"norms": norms}), verify=False)

    def prepared_on(data, **changes):
        return prepare(plan, settings_of(**changes), data, (model, graph))

    one_each = {"clients": 40, "minimum_samples": 1, "partition": "natural"}
    groups = torch.arange(80).clamp(max=39)  # the last of 40 clients has all that the others leave
    with pytest.raises(InputError, match=r"client \d+ has one image: batch norm .* use --minimum-samples 2"):
        prepared_on(replace(dataset, train_groups=groups), **one_each)
    one_test_image = replace(dataset, test_images=dataset.test_images[:1], test_labels=dataset.test_labels[:1])
    with pytest.raises(InputError, match="made up has one test image: batch norm would see one value a channel"):
        prepared_on(one_test_image)
    with pytest.raises(InputError, match="made up has one training image: batch norm would see one value a channel"):
        check_lone_images(graph, norms, replace(dataset, train_labels=dataset.train_labels[:1]), {})
    frozen = Config(freeze_depth=2, full_depth=3, head_scale=1.0)
    check = partial(check_lone_images, graph, norms, dataset)
    if norms == "running":  # a frozen norm takes no statistics
        check({0: [frozen]})
    else:
        with pytest.raises(InputError, match="client 0 has one image"):
            check({0: [frozen]})
    with pytest.raises(InputError, match="client 0 has one image"):
        check({0: [Config(freeze_depth=1, full_depth=3, head_scale=1.0)]})


def test_one_image_is_enough_where_norms_see_more_than_one_value(full_plan, dataset, tmp_path):
    few = {"train_images": dataset.train_images[:5], "train_labels": dataset.train_labels[:5]}
    one = {"test_images": dataset.test_images[:1], "test_labels": dataset.test_labels[:1]}
    result = run(full_plan, replace(dataset, **few, **one), tmp_path / "run", rounds=1, minimum_samples=1)
    assert result.status == "finished"
    assert result.accuracy_batch_statistics in (0.0, 1.0)


def test_clients_are_dealt_to_tiers_by_share(scheduled_plan, dataset):
    run = prepared(scheduled_plan, dataset, clients=20)
    assert [run.tier_of.count(i) for i in range(3)] == [4, 8, 8]
    assert sorted(np.concatenate(run.images_of)) == list(range(80))
    assert deal_clients(scheduled_plan, settings_of(clients=20)) == run.tier_of
    assert deal_clients(scheduled_plan, settings_of(clients=20, seed=4)) != run.tier_of


def test_every_round_belongs_to_one_stage(scheduled_plan):
    rounds = 23
    strategy = SuccessiveLayerTraining(scheduled_plan, rounds)
    stages = [strategy.stage(ServerState(r, {})) for r in range(rounds)]
    assert sorted(set(stages)) == list(range(len(scheduled_plan.stages)))
    assert stages == sorted(stages)
    assert strategy.stage(ServerState(rounds, {})) == stages[-1]


def test_small_data_gets_a_batch_that_a_client_fills_several_times(full_plan, dataset):
    defaults = default_settings(full_plan, dataset, None)
    assert (defaults.clients, defaults.rounds, defaults.cohort_size) == (10, 30, 10)
    assert defaults.local_batch == 2
    assert default_settings(full_plan, dataset, 1).local_batch == 8
    writers = replace(dataset, train_groups=torch.arange(80).clamp(max=10))  # ten of one image, one of seventy
    alone = default_settings(full_plan, writers, 1, "natural", 40)
    assert (alone.images_a_client, alone.local_batch) == (70, 8)
    few = default_settings(full_plan, writers, 3, "natural", 1, seed=4)
    owners = partition(writers.train_labels, 3, "natural", 4, groups=writers.train_groups, minimum=1)
    assert few.images_a_client == max(2, int(owners.sizes.sum()) // 3)


def test_evaluation_counts_every_image_once_and_never_a_batch_of_one(dataset):
    for total in (1, 2, 1024, 1025, 2049, 3000):
        pieces = list(split_without_tail(torch.arange(total), 1024))
        assert torch.equal(torch.cat(pieces), torch.arange(total))
        assert all(len(piece) > 1 for piece in pieces) or total == 1
    model = extract(GRAPH, network(), Config.full_network())
    accuracy, loss = evaluate(model, dataset, seed=1)
    logits = model.eval()(normalise(dataset.test_images, dataset))
    assert accuracy == pytest.approx((logits.argmax(1) == dataset.test_labels).float().mean().item())
    assert loss == pytest.approx(F.cross_entropy(logits, dataset.test_labels).item(), rel=1e-5)


def test_what_another_process_works_on_is_not_overwritten(full_plan, dataset, tmp_path):
    for name in ("slt-seed0", "slt-seed1"):
        run(full_plan, dataset, tmp_path / name, rounds=1)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with RunFolder(tmp_path / "slt-seed1").alone(), pytest.raises(InputError, match="another process is at work"):
        clear_runs(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files
    clear_runs(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_small_network_is_of_the_weakest_tier_that_holds_one(scheduled_plan, dataset):
    own = prepared(scheduled_plan, dataset, strategy="small")
    taking_part = {tier.name: own.strategy.tier_steps(tier.name) for tier in scheduled_plan.tiers}
    assert taking_part["tiny"] == ()
    assert taking_part["weak"] == taking_part["strong"] != ()


def test_tiers_without_clients_neither_train_nor_are_judged(scheduled_plan, dataset):
    plan = scheduled_plan.model_copy(update={"tiers": scheduled_plan.tiers[1:]})
    own = prepared(plan, dataset, strategy="heterofl", clients=1, cohort_size=1)
    (place,) = own.tier_of
    steps = own.strategy.tier_steps(plan.tiers[place].name)
    assert own.strategy.evaluation_config(own.start).head_scale == steps[0].config.head_scale
    assert own.strategy.tier_steps(plan.tiers[1 - place].name) == ()
    _, row = run_round(own, own.start)
    assert row.measured_peak_bytes.keys() == {plan.tiers[place].name}


def test_a_rate_that_would_rise_is_refused():
    with pytest.raises(ValueError, match=r"final learning rate 0\.01 is above the first, 0\.001"):
        settings_of(learning_rate=0.001)


def test_each_client_gets_the_model_as_it_was_sent(scheduled_plan, dataset):
    prepared_run = prepared(scheduled_plan, dataset)
    clients = draw_cohort(prepared_run, prepared_run.start)
    sent = SentModels(prepared_run, prepared_run.start)
    untouched = copy.deepcopy(sent.to(clients[0]).state_dict())
    first, _ = train_assignment(prepared_run, prepared_run.start, clients[0], sent)
    kept = copy.deepcopy(first)
    train_assignment(prepared_run, prepared_run.start, clients[1], sent)
    again = sent.to(clients[0])
    assert all(parameter.grad is None for parameter in again.parameters())
    assert all(torch.equal(value, untouched[name]) for name, value in again.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in first.items())
    assert any(not torch.equal(value, untouched[name]) for name, value in first.items())


def test_images_are_cropped_and_flipped_where_that_makes_sense_unless_it_is_off(full_plan, dataset, tmp_path):
    weights = {}
    for photographs, augment in product((False, True), (False, True)):
        folder = tmp_path / f"{photographs}-{augment}"
        run(full_plan, replace(dataset, augment=photographs), folder, rounds=1, augment=augment)
        weights[photographs, augment] = (folder / "weights.safetensors").read_bytes()
    plain = weights.pop((False, False))
    assert [own == plain for own in weights.values()] == [True, True, False]


@pytest.mark.parametrize("augment", [False, True])
def test_a_clients_real_step_needs_what_the_plan_measured(augment):
    """The whole of local training, recorded: nothing but the step and the client's list of images is alive."""
    model = load_model("resnet20")
    graph = trace(model, (3, 32, 32))
    config, batch = Config(freeze_depth=4, full_depth=5, head_scale=0.25), 16
    images = torch.randint(256, (96, 3, 32, 32), dtype=torch.uint8)
    data = Dataset(
        "noise", images, torch.arange(96) % 10, images[:2], torch.arange(2), 10, (0.5,) * 3, (0.3,) * 3, augment
    )
    spec = StepSpec(batch_size=batch, threads=1)
    sub = extract(graph, model, config)
    planned = measure(sub, spec, details=False).peak_bytes
    before = sum(parameter.nbytes for parameter in sub.parameters())
    training = LocalTraining(spec.settings, batch, epochs=1, learning_rate=0.01)
    events = recording.record(lambda: train_client(sub, data, np.arange(96), training, seed=1))
    peak = before + recording.peak_growth(events)
    order_and_generators = 2 * 96 * 8 + 16_384
    assert planned <= peak <= planned + order_and_generators


def test_a_step_over_its_budget_on_this_machine_is_refused_before_the_first_round(scheduled_plan, dataset):
    """As on a machine whose kernels need more scratch than the one that planned."""
    data = scheduled_plan.model_dump()
    for tier in data["tiers"]:
        tier["budget_bytes"] //= 4
        for stage in tier["stages"]:
            stage["measured_peak_bytes"] //= 4
            stage["measured_breakdown"] = {"weights": stage["measured_peak_bytes"]}
    with pytest.raises(
        InfeasibleError, match=r"tier weak: a step of .* needs .* on this machine; make the plan again here"
    ):
        prepared(
            type(scheduled_plan).model_validate(data | {"tiers": [t | {"proofs": ()} for t in data["tiers"]]}), dataset
        )


def test_train_from_python_takes_the_commands_arguments(full_plan, tmp_path):
    shape = (1, 8, 8)
    plan = solve(trace(load_model("convnet", 10, shape), shape), ["1GB"], StepSpec(batch_size=8, threads=1), "convnet")
    result = train(plan, "digits", rounds=1, clients=20, cohort_size=1, out=tmp_path / "run")
    assert result.settings == RunSettings(
        strategy="slt", dataset="digits", rounds=1, clients=20, cohort_size=1, local_batch=8
    )
    with pytest.raises(ValueError, match="clients"):
        train(plan, "digits", clients=-1, out=tmp_path / "other")


def test_clients_under_their_budget_train_the_same_network(scheduled_plan, dataset, tmp_path):
    run(scheduled_plan, dataset, tmp_path / "free", rounds=8)
    result = run(scheduled_plan, dataset, tmp_path / "held", rounds=8, enforce=True)
    assert result.status == "finished"
    free, held = (load_file(tmp_path / name / "weights.safetensors") for name in ("free", "held"))
    assert all(torch.equal(value, held[name]) for name, value in free.items())


def test_a_client_is_stopped_one_byte_below_what_its_step_needs(dataset):
    config = Config(freeze_depth=1, full_depth=2, head_scale=0.5)
    calibrate(GRAPH, [config], SPEC)
    training = LocalTraining(SPEC.settings, SPEC.batch_size, epochs=2, learning_rate=0.1, enforce=True)
    with threads(SPEC):
        peak = measure(extract(GRAPH, None, config), SPEC, details=False).peak_bytes
        indices = np.arange(32)
        train_client(extract(GRAPH, network(), config), dataset, indices, training, 1, peak)
        with pytest.raises(BudgetExceeded, match="1 over the budget"):
            train_client(extract(GRAPH, network(), config), dataset, indices, training, 1, peak - 1)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_runs_in_other_precisions_learn_and_send_what_they_say(precision, dataset, tmp_path):
    plan = solve(GRAPH, ["1GB"], SPEC.model_copy(update={"precision": precision}))
    plain = solve(GRAPH, ["1GB"], SPEC)
    stage, plain_stage = plan.tiers[0].stages[0], plain.tiers[0].stages[0]
    assert stage.measured_peak_bytes < plain_stage.measured_peak_bytes
    assert stage.upload_bytes == plain_stage.upload_bytes // (2 if precision == "bf16" else 1)
    result = run(plan, dataset, tmp_path / "run", rounds=15)
    assert result.rows[-1].accuracy > 0.5 > result.rows[0].accuracy or result.rows[-1].accuracy > 0.7
    assert result.rows[-1].bytes_up == 2 * stage.upload_bytes


def test_a_plan_for_another_device_is_not_run_here(full_plan, dataset):
    elsewhere = full_plan.model_copy(update={"step": full_plan.step.model_copy(update={"device": "cuda"})})
    with pytest.raises(InputError, match="the plan is for cuda"):
        prepared(elsewhere, dataset)


def test_with_a_single_tier_nested_widths_are_the_small_network_to_the_bit(tmp_path, dataset):
    weakest = tiny_runs.scheduled_plan().tiers[1].model_copy(update={"share": 1.0})
    plan = tiny_runs.scheduled_plan().model_copy(update={"tiers": (weakest,)})
    for strategy in ("small", "heterofl"):
        run(plan, dataset, tmp_path / strategy, strategy=strategy, rounds=3)
    small, nested = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("small", "heterofl"))
    assert small == nested
