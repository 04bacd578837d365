"""The house rules: imports run one way, and there is one public door."""

import ast
import subprocess
import sys
from pathlib import Path

import slt_planner

PACKAGE = Path(slt_planner.__file__).parent

# What each part may import besides itself; errors, units, files and config are everybody's.
BELOW = {
    "graph": set(),
    "models": {"graph"},
    "submodel": {"graph"},
    "memory": {"graph", "submodel", "models"},
    "planning": {"graph", "submodel", "memory", "models"},
    "data": set(),
    "federated": {"graph", "models", "submodel", "memory", "planning", "data"},
    "cli": {"graph", "models", "submodel", "memory", "planning", "federated", "data", "reporting"},
}
RECORDS = {
    "planning.costs",
    "planning.levers",
    "planning.plan",
    "planning.verification",
    "memory.profile",
    "federated.result",
}
FREE_OF_TORCH = [
    "config",
    "units",
    "errors",
    "files",
    "planning.levers",
    "planning.plan",
    "planning.tiers",
    "planning.costs",
    "federated.result",
    "reporting.report",
    "cli.main",
]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("slt_planner."):
            yield node.module.removeprefix("slt_planner.")


def test_imports_run_one_way():
    for part, below in BELOW.items():
        for path in (PACKAGE / part).rglob("*.py"):
            for module in imports_of(path):
                top = module.partition(".")[0]
                allowed = {"config", "errors", "units", "files", "environment", part} | below
                assert top in allowed, f"{path.relative_to(PACKAGE)} imports {module}"


def test_reports_read_records_only():
    for path in (PACKAGE / "reporting").rglob("*.py"):
        for module in imports_of(path):
            top = module.partition(".")[0]
            assert top in {"config", "errors", "units", "files", "reporting"} or module in RECORDS, f"{path}: {module}"


def test_torch_is_imported_only_where_tensors_are():
    code = "import sys, importlib\n" + "".join(f"importlib.import_module('slt_planner.{m}')\n" for m in FREE_OF_TORCH)
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


def test_the_public_door_gives_what_it_names_and_nothing_else():
    assert sorted(slt_planner.__all__) == sorted(slt_planner._HOME)
    for name in slt_planner.__all__:
        assert getattr(slt_planner, name).__module__.startswith("slt_planner.")
    assert not hasattr(slt_planner, "nonsense")
    assert set(dir(slt_planner)) == {*slt_planner.__all__, "__version__"}
