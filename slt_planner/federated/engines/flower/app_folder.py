"""A thin Flower app: one pyproject.toml that names the components of this package, and what the run is made from."""

import json
from pathlib import Path
from typing import Any

from slt_planner.federated.engines.flower.options import FlowerOptions
from slt_planner.federated.result import RunSettings
from slt_planner.files import refuse_existing, write_text

FLOWER_VERSION = "1.41.0"
_OWN_KEYS = frozenset({"plan", "out", "resume", "model"})
OF_ONE_MACHINE = {"workers", "prefix_cache", "batched_clients", "device"}
"""Settings that mean nothing where each client is a machine."""
_TEXT = """\
# Made by slt flower init. Each machine has slt-planner[flower] installed; this app brings nothing of its own.
[project]
name = "{name}"
version = "1.0.0"
description = "A federated run of slt-planner"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
serverapp = "slt_planner.federated.engines.flower.server:app"
clientapp = "slt_planner.federated.engines.flower.client:app"

# Any of these can be given anew: flwr run . CONNECTION -c 'rounds=50 seed=1'
# plan and out are paths on the machine of the SuperLink. resume=true goes on with the run in out.
[tool.flwr.app.config]
{config}
"""


def run_config_keys() -> set[str]:
    """What an app's configuration may hold."""
    fields = {*FlowerOptions.model_fields, *RunSettings.model_fields} - OF_ONE_MACHINE
    return {name.replace("_", "-") for name in fields} | _OWN_KEYS


def write_app(
    folder: Path, plan: Path, out: Path, settings: RunSettings, options: FlowerOptions, model: str, force: bool = False
) -> None:
    """Write the app's folder.

    Raises:
        InputError: it holds an app and `force` is False, or it cannot be written.
    """
    path = folder / "pyproject.toml"
    if not force:
        refuse_existing([path])
    own = {"plan": str(plan.absolute()), "out": str(out.absolute()), "resume": False, "model": model}
    config = own | options.model_dump() | settings.model_dump(exclude=OF_ONE_MACHINE)
    lines = [f"{name.replace('_', '-')} = {_toml(value)}" for name, value in config.items()]
    name = "".join(c if c.isalnum() else "-" for c in folder.absolute().name.lower()).strip("-") or "run"
    write_text(path, _TEXT.format(name=name, config="\n".join(lines)), force=force)


def connection(address: str, root_certificates: Path | None) -> str:
    """What Flower's own config.toml needs to reach a SuperLink: its certificate, or None to talk in the clear."""
    secure = "insecure = true" if root_certificates is None else f"root-certificates = {_toml(str(root_certificates))}"
    return f'[superlink.slt]\naddress = "{address}"\n{secure}\n'


def _toml(value: Any) -> str:
    """A value as TOML; an empty text is one that is not given."""
    return json.dumps("" if value is None else value)
