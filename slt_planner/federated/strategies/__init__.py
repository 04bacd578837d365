"""Federated methods, one a file, on one interface."""
