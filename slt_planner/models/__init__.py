"""Reference networks and the registry of their names."""
