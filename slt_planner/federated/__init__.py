"""A plan goes in, a federated run comes out."""
