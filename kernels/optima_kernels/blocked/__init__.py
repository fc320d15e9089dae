"""Losses as torch calls over tiles: bounded memory on any device, the default on CPU and the fallback on CUDA."""
