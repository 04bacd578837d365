"""The known width rules, one small function a layer kind; importing this registers them."""

from slt_planner.graph.rules import arithmetic, attention, indexing, norms, shapes, weighted

__all__ = ["arithmetic", "attention", "indexing", "norms", "shapes", "weighted"]
