"""Clients behind Flower (flwr): a simulation on Ray, or devices that run a SuperNode. See docs/flower.md."""

import os

# What Flower and Ray would send about a run to their makers stays here, unless the user says otherwise.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # spares a warning; nothing here uses a GPU
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # an app of ours has no dependencies of its own
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
