"""Pages: each a template and what it is filled with."""
