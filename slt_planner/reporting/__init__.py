"""Records become pages, pictures and tables."""
