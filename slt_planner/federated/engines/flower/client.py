"""The client app: it says who it is, and trains what it is told; a device needs nothing else of this package.

A SuperNode runs `app`, in a new process for every message: torch is imported only where something is trained.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from slt_planner.errors import InputError
from slt_planner.federated.engines.flower.introduction import introduction

if TYPE_CHECKING:
    from torch import Tensor

    from slt_planner.data.datasets import Dataset
    from slt_planner.federated.engines.flower.messages import Brief, Task
    from slt_planner.graph.trace import ModelGraph
    from slt_planner.submodel.extract import SubModel

FAILED = 2  # Flower's code of a client that raised
_KEPT = "kept"


@dataclass(frozen=True)
class Site:
    """What a client has of its own: the network's structure, and images; its own ones, or those of a simulation."""

    graph: "ModelGraph"
    dataset: "Dataset"
    own_images: bool = False


def site_of(brief: "Brief", config: Mapping[str, object]) -> Site:
    """That of this machine; `config` is its node config, with the run's network.

    ``dataset`` are images of its own, all to be trained on; ``model`` is the network, where it is the user's own code.

    Raises:
        InputError: as `load_dataset` and `planned_network`.
    """
    return _site(brief, str(config.get("model") or ""), str(config.get("dataset") or ""))


@lru_cache(maxsize=1)
def _site(brief: "Brief", model: str, dataset: str) -> Site:
    from pathlib import Path

    from slt_planner.data.datasets import load_dataset
    from slt_planner.planning.network import planned_network

    if len(brief.input_shape) != 3:
        raise InputError(f"the input {brief.input_shape} is not an image (channels, height, width)")
    channels, height, width = brief.input_shape
    root = None if brief.data_root is None else Path(brief.data_root).expanduser()
    graph = planned_network(brief, model or None, weights=False)[1]
    images = load_dataset(dataset or brief.dataset, (channels, height, width), brief.num_classes, root=root)
    return Site(graph, images, own_images=bool(dataset))


def client_app(find_site: Callable[["Brief", Mapping[str, object]], Site] = site_of) -> ClientApp:
    """An app whose clients have what `find_site` gives; a failure is told to the server in one line."""
    app = ClientApp()

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        """Say who this is."""
        own = introduction(context.node_config)
        return Message(RecordDict({"record": ConfigRecord({"json": own.model_dump_json()})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Train a sub-model; what was trained goes back."""
        try:
            return _train(message, context, find_site)
        except Exception as error:  # the server names it in the round's row; the device is ready for the next one
            logging.getLogger(__name__).exception("this round's training failed")
            return Message(Error(FAILED, f"{type(error).__name__}: {error}"), reply_to=message)

    return app


def _train(message: Message, context: Context, find_site: Callable[["Brief", Mapping[str, object]], Site]) -> Message:
    import math

    import numpy as np

    from slt_planner.federated.client import train_client
    from slt_planner.federated.engines.flower.messages import (
        Outcome,
        Task,
        images_in,
        packed,
        record_in,
        weights_in,
        write_state,
    )
    from slt_planner.memory.calibrate import calibrate
    from slt_planner.memory.step import as_trained, threads
    from slt_planner.submodel.extract import extract

    task = record_in(message, Task)
    site = find_site(task.brief, {"model": context.run_config.get("model"), **context.node_config})
    indices = np.arange(len(site.dataset.train_labels)) if site.own_images else images_in(message)
    step = task.training.step
    with threads(step):
        if task.budget_bytes is not None:
            calibrate(site.graph, [task.config], step.with_batch(task.training.batch_size))
        model = as_trained(extract(site.graph, None, task.config, step.norms), step)
        _fill(model, weights_in(message), task, context)
        loss = train_client(model, site.dataset, indices, task.training, task.seed, task.budget_bytes)
    outcome = Outcome(loss=loss if math.isfinite(loss) else None, samples=len(indices))
    return Message(packed(outcome, write_state(model.trained_state())), reply_to=message)


def _fill(model: "SubModel", sent: "dict[str, Tensor]", task: "Task", context: Context) -> None:
    """Give a sub-model the weights that came, and those that were kept; keep what is to be kept.

    Raises:
        InputError: tensors that are missing, not the sub-model's, or of another shape or number format.
    """
    import torch

    from slt_planner.federated.engines.flower.messages import read_state, write_state

    units = model.extraction.graph.unit_of_tensor()
    if task.held_depth:
        _check_kept(context, task.stage, task.held_depth)
        sent = {**read_state(context.state.array_records[_KEPT]), **sent}
    expected = model.held_state()
    if sent.keys() != expected.keys():
        name = min(sent.keys() ^ expected.keys())
        raise InputError(f"{name} is {'not expected' if name in sent else 'missing'} among the weights that came")
    with torch.no_grad():
        for name, tensor in expected.items():
            if sent[name].shape != tensor.shape or sent[name].dtype != tensor.dtype:
                raise InputError(
                    f"{name} came as {sent[name].dtype} of shape {tuple(sent[name].shape)}; "
                    f"it must be {tensor.dtype} of {tuple(tensor.shape)}"
                )
            tensor.copy_(sent[name])
    if task.keep_depth and task.keep_depth != task.held_depth:
        keep = {name: tensor for name, tensor in expected.items() if units[name] <= task.keep_depth}
        context.state[_KEPT] = write_state(keep)
        context.state[f"{_KEPT}.of"] = ConfigRecord({"stage": task.stage, "depth": task.keep_depth})


def _check_kept(context: Context, stage: int, depth: int) -> None:
    of = context.state.config_records.get(f"{_KEPT}.of")
    if of is None or (of["stage"], of["depth"]) != (stage, depth):
        raise InputError(f"the weights of units 1 to {depth} that were to be kept here are not; they will come again")


app = client_app()
