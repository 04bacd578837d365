"""The server app: a plan goes in by its path, a run folder comes out, on the machine where the SuperLink is."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from pydantic import ValidationError

from slt_planner.errors import InputError, first_invalid
from slt_planner.federated.engines.flower.app_folder import run_config_keys
from slt_planner.federated.engines.flower.engine import FlowerEngine
from slt_planner.federated.engines.flower.options import FlowerOptions
from slt_planner.federated.experiment import begin_run, continue_run, prepare_again
from slt_planner.federated.result import RoundRow, RunResult, RunSettings
from slt_planner.federated.run_folder import load_run
from slt_planner.federated.setup import load_data, load_network, prepare
from slt_planner.planning.plan import load_plan

_LOG = logging.getLogger("flwr")  # it is shown by `flwr run --stream`

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Make the run that the app's configuration describes, or go on with it."""
    result = serve(grid, context.run_config)
    _LOG.info("finished: %s", result.settings.model_dump_json())


def serve(grid: Grid, config: Mapping[str, Any]) -> RunResult:
    """A run on the nodes of a grid.

    Args:
        grid: what Flower gives a server app.
        config: the app's configuration: ``plan``, ``out``, ``resume``, ``model``, the fields of `FlowerOptions` and
            those of `RunSettings`, with - in the place of _.

    Raises:
        InputError: a key that is unknown, missing or has a wrong value; a plan, data or folder that do not go together.
        SltError: too few clients are connected; the run can go on.
    """
    if unknown := sorted(config.keys() - run_config_keys()):
        raise InputError(f"the app's configuration has {unknown[0]}, which nothing here uses")
    if missing := sorted({"plan", "out"} - config.keys()):
        raise InputError(f"the app's configuration lacks {missing[0]}")
    options = _fields(FlowerOptions, config)
    folder, model = Path(str(config["out"])), str(config.get("model") or "") or None
    if config.get("resume"):
        begun = load_run(folder)
        if begun.status == "finished":
            return begun
        run = prepare_again(begun, model)
    else:
        plan, settings = load_plan(str(config["plan"])), _fields(RunSettings, config)
        network = load_network(plan, settings.seed, model)
        run = prepare(plan, settings, load_data(plan, settings.dataset, settings.data_root), network)
        begin_run(run, folder)
    return continue_run(run, folder, _tell, FlowerEngine(grid, options))


def _fields(record: Any, config: Mapping[str, Any]) -> Any:
    """A record made of those keys that are its own; empty text is a field that is not given."""
    fields = {name: config.get(name.replace("_", "-")) for name in record.model_fields}
    try:
        return record.model_validate({name: value for name, value in fields.items() if value not in (None, "")})
    except ValidationError as error:
        raise InputError(f"the app's configuration: {first_invalid(error)}") from error


def _tell(row: RoundRow) -> None:
    """A round in a line, those that did not take part by name."""
    accuracy = "" if row.accuracy is None else f", accuracy {row.accuracy:.1%}"
    _LOG.info("round %d%s, %.1f s", row.round, accuracy, row.seconds)
    for own in (*row.absent, *row.refusals):
        _LOG.warning("round %d goes on without client %d: %s", row.round, own.client, own.reason)
