"""Every torchvision network: is it traced, cut, trained and merged back right? A table, and the results as JSON.

For each network: trace it; (0, 0, 1.0) must equal it to the bit in training and evaluation mode (one seed for
stochastic layers); at five random legal configurations it must train one step with a finite loss, and merging the
untouched sub-model must give the state back. Detectors are traced as far as their shapes do not depend on data (their
backbone) and run whole. Run with ``python benchmarks/torchvision_models.py [NAME...]``.
"""

import argparse
import copy
import json
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils import _pytree as pytree
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from slt_planner.config import Config, Optimizer, StepSettings
from slt_planner.environment import environment
from slt_planner.errors import SltError
from slt_planner.files import write_text
from slt_planner.graph.trace import ModelGraph, trace
from slt_planner.memory.step import make_optimizer, training_step
from slt_planner.models.registry import find_model, load_model, torchvision_names
from slt_planner.submodel.extract import extract
from slt_planner.submodel.merge import merge

RESULT = Path(__file__).parent / "results" / "torchvision_models.json"
# Small inputs, so that all of it runs on a laptop; sizes that a network cannot take are its own.
SIZES = {"inception_v3": 299, "googlenet": 224, "alexnet": 96, "maxvit_t": 224, "vit_h_14": 56, "s3d": 224}
DETECTION = 128
CONFIGS = 5


def input_shape(name: str) -> tuple[int, ...]:
    shape = find_model(name).input_shape
    detects = name in torchvision.models.list_models(module=torchvision.models.detection)
    size = SIZES.get(name, DETECTION if detects else 64)
    if name.startswith("mvit"):
        return shape  # its tables of positions are made for one size
    return (*shape[:-2], size, size)


def random_config(graph: ModelGraph, draw: random.Random) -> Config:
    full_depth = draw.randint(0, graph.depth)
    freeze_depth = draw.randint(0, max(0, full_depth - 1))
    return Config(
        freeze_depth=freeze_depth, full_depth=full_depth, head_scale=draw.choice(graph.head_scales(full_depth))
    )


def equal(one: object, other: object) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def is_the_model(graph: ModelGraph, model: nn.Module, images: torch.Tensor) -> bool:
    """(0, 0, 1.0) against the model, in both modes."""
    same = []
    labels = graph.adapter.example_labels(len(images), graph.num_classes, graph.input_shape)
    for mode in (True, False):
        sub = extract(graph, model, Config.full_network(), norms="running").train(mode)
        whole = copy.deepcopy(model).train(mode)
        outputs = []
        for network in (sub, whole):
            torch.manual_seed(1)
            with torch.no_grad():
                outputs.append(network(*arguments(graph, images, labels if mode else None)))
        same.append(equal(*outputs))
    return all(same)


def arguments(graph: ModelGraph, images: torch.Tensor, labels: object) -> tuple[object, ...]:
    """What the network is called with: detectors take lists of images, and targets in training."""
    if not graph.adapter.part:
        return graph.adapter.inputs(images)
    return (list(images),) if labels is None else (list(images), labels)


def train_once(graph: ModelGraph, model: nn.Module, config: Config, images: torch.Tensor) -> bool:
    sub = extract(graph, model, config)
    step = StepSettings(optimizer=Optimizer())
    labels = graph.adapter.example_labels(len(images), graph.num_classes, graph.input_shape)
    optimizer = make_optimizer(sub.parameters(), step.optimizer, 1e-4)
    loss = training_step(sub, optimizer, images, labels, step, graph.adapter)
    return bool(torch.isfinite(loss))


def merges_back(graph: ModelGraph, model: nn.Module, config: Config) -> bool:
    state = model.state_dict()
    merged = merge(graph, state, [(config, extract(graph, model, config).trained_state(), 3)])
    return merged.keys() == state.keys() and all(torch.equal(merged[name], state[name]) for name in state)


def examine(name: str) -> dict[str, object]:
    torch.manual_seed(0)
    try:
        shape = input_shape(name)
    except SltError as error:
        return {"model": name, "right": False, "error": str(error)}
    row: dict[str, object] = {"model": name, "input_shape": shape}
    model = load_model(name, input_shape=shape)
    if isinstance(resize := getattr(model, "transform", None), GeneralizedRCNNTransform):
        resize.min_size, resize.max_size = (shape[-1],), shape[-1]  # detectors bring images to a size of their own
    began = time.perf_counter()
    try:
        graph = trace(model, shape)
        row |= {"trace_s": round(time.perf_counter() - began, 2), "depth": graph.depth}
        draw = random.Random(name)
        configs = [random_config(graph, draw) for _ in range(CONFIGS)]
        images = torch.randn(2, *shape)
        row["equals_model"] = is_the_model(graph, model, images)
        row["trains"] = sum(train_once(graph, model, config, images) for config in configs)
        row["merges"] = sum(merges_back(graph, model, config) for config in configs)
        row["configs"] = [str(config) for config in configs]
    except SltError as error:
        row["error"] = str(error)
    row["right"] = bool(row.get("equals_model")) and row.get("trains") == row.get("merges") == CONFIGS
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks; all by default, and only then is the result written")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args()
    names = arguments.names
    refused = torchvision.models.list_models(module=torchvision.models.optical_flow)
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in pool.map(examine, names or [*torchvision_names(), *refused]):
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(f"{sum(bool(row['right']) for row in rows)} of {len(rows)} right")
    if not names:
        result = {"environment": environment(threads=1), "batch_size": 2, "rows": rows}
        write_text(RESULT, json.dumps(result, indent=1) + "\n", force=True)


if __name__ == "__main__":
    main()
