"""Cutting a sub-model out of a network, and merging trained ones back."""
