"""Tiers and a ModelGraph go in, a plan comes out."""
