"""slt_planner: a model and memory budgets go in; a schedule that provably fits, and the accuracy it buys, come out.

The names below are the whole public API; they are loaded when first used, so that importing the package is cheap.
"""

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("slt-planner")

# Without this torch's profiler writes lines of its own to stderr at every measurement.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

if TYPE_CHECKING:
    from slt_planner.config import Config, Optimizer, StepSpec, Tier
    from slt_planner.errors import BudgetExceeded, InfeasibleError, InputError, SltError, UnsupportedLayerError
    from slt_planner.federated.experiment import resume, train
    from slt_planner.federated.result import RunResult
    from slt_planner.federated.run_folder import load_run
    from slt_planner.federated.trained import load_trained
    from slt_planner.graph.adapter import Adapter
    from slt_planner.graph.trace import ModelGraph, trace
    from slt_planner.memory.calibrate import Calibration, calibrate
    from slt_planner.memory.limit import memory_limit
    from slt_planner.memory.measure import measure
    from slt_planner.memory.predict import predict
    from slt_planner.memory.process import measure_process
    from slt_planner.memory.profile import MemoryProfile, load_profile
    from slt_planner.models.registry import load_model
    from slt_planner.planning.plan import Plan, load_plan
    from slt_planner.planning.solve import solve
    from slt_planner.planning.tiers import load_tiers
    from slt_planner.planning.verification import Verification
    from slt_planner.planning.verify import verify
    from slt_planner.planning.what_if import what_if
    from slt_planner.reporting.report import report
    from slt_planner.submodel.extract import SubModel, extract
    from slt_planner.submodel.merge import merge

_HOME = {
    "Adapter": "graph.adapter",
    "Config": "config",
    "BudgetExceeded": "errors",
    "Calibration": "memory.calibrate",
    "InfeasibleError": "errors",
    "InputError": "errors",
    "MemoryProfile": "memory.profile",
    "ModelGraph": "graph.trace",
    "Optimizer": "config",
    "Plan": "planning.plan",
    "RunResult": "federated.result",
    "SltError": "errors",
    "StepSpec": "config",
    "SubModel": "submodel.extract",
    "Tier": "config",
    "UnsupportedLayerError": "errors",
    "Verification": "planning.verification",
    "calibrate": "memory.calibrate",
    "extract": "submodel.extract",
    "load_model": "models.registry",
    "load_profile": "memory.profile",
    "load_plan": "planning.plan",
    "load_run": "federated.run_folder",
    "load_tiers": "planning.tiers",
    "load_trained": "federated.trained",
    "measure": "memory.measure",
    "measure_process": "memory.process",
    "memory_limit": "memory.limit",
    "merge": "submodel.merge",
    "predict": "memory.predict",
    "report": "reporting.report",
    "resume": "federated.experiment",
    "solve": "planning.solve",
    "trace": "graph.trace",
    "train": "federated.experiment",
    "verify": "planning.verify",
    "what_if": "planning.what_if",
}

__all__ = [
    "Adapter",
    "BudgetExceeded",
    "Calibration",
    "Config",
    "InfeasibleError",
    "InputError",
    "MemoryProfile",
    "ModelGraph",
    "Optimizer",
    "Plan",
    "RunResult",
    "SltError",
    "StepSpec",
    "SubModel",
    "Tier",
    "UnsupportedLayerError",
    "Verification",
    "calibrate",
    "extract",
    "load_model",
    "load_plan",
    "load_profile",
    "load_run",
    "load_tiers",
    "load_trained",
    "measure",
    "measure_process",
    "memory_limit",
    "merge",
    "predict",
    "report",
    "resume",
    "solve",
    "trace",
    "train",
    "verify",
    "what_if",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
