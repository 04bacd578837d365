"""The door to the tables for terminals."""

from slt_planner.reporting.plan_table import plan_table
from slt_planner.reporting.run_table import run_table

__all__ = ["plan_table", "run_table"]
