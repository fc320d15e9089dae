"""Shipped configurations by name, for `--config NAME`."""
