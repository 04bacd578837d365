"""A training step without values: every operator called, nothing computed, the life of every storage followed."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from slt_planner.config import Config, StepSpec
from slt_planner.errors import UnsupportedLayerError
from slt_planner.graph.trace import ModelGraph
from slt_planner.memory.attribution import Attribution, unit_rows
from slt_planner.memory.flops import step_costs
from slt_planner.memory.hollow import make_hollow
from slt_planner.memory.profile import StepCosts, UnitRow
from slt_planner.memory.saved import saving_seen
from slt_planner.memory.step import SteadyStep, as_trained
from slt_planner.memory.storages import Storages
from slt_planner.memory.watch import Call, Watch, values_refused
from slt_planner.submodel.extract import extract


@dataclass
class SimulatedStep:
    """Every operator of a steady step in order, every storage that is alive in it, and what the step costs.

    `units` has a row a unit if it was asked for.
    """

    calls: list[Call]
    storages: Storages
    costs: StepCosts
    units: tuple[UnitRow, ...] = ()

    @property
    def tensor_peak_bytes(self) -> int:
        """The most that is live at the end of an operator."""
        return self.storages.tensor_peak(len(self.calls))


def simulate(graph: ModelGraph, config: Config, spec: StepSpec, details: bool) -> SimulatedStep:
    """Run a steady step of a sub-model on tensors without values.

    Raises:
        UnsupportedLayerError: what the step does depends on values, so that it must be measured.
        InputError: the configuration goes beyond the network's units.
    """
    if graph.adapter.part:
        raise UnsupportedLayerError("the network's shapes depend on data: its memory can be measured, not predicted")
    module = as_trained(extract(graph, None, config, spec.norms, on_meta=True), spec)
    costs = step_costs(module)
    make_hollow(module, torch.device("cuda:0" if spec.device == "cuda" else "cpu"))
    step = SteadyStep(module, spec, graph.input_shape, graph.num_classes, graph.adapter)
    attribution = Attribution()
    watch = Watch(attribution, details, spec.device)
    watch.hold(step.tensors())
    with watch:
        step.prepare()
        watch.hold(step.tensors())
        watch.forget_calls()
        attribution.begin(step.module, step.optimizer)
        following = attribution.following(module) if details else nullcontext()
        in_one_thread = torch.autograd.set_multithreading_enabled(False)  # as it is measured
        with saving_seen(watch.say_saved), following, values_refused(), in_one_thread:
            step.run(watch.hold)
    return SimulatedStep(
        calls=watch.calls,
        storages=Storages.of(watch.storages),
        costs=costs.model_copy(update={"train_flops_per_sample": watch.flops // spec.batch_size}),
        units=unit_rows(step, attribution, watch.saved_by_unit(), spec.batch_size) if details else (),
    )
