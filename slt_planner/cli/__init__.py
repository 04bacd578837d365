"""The commands: they parse and print."""
