"""From a module to its ModelGraph, and what a head scale does to every width."""
