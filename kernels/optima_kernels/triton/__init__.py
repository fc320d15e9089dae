"""Triton kernels, one family per file. Nothing here is imported before a loss first runs on the "triton" backend."""
