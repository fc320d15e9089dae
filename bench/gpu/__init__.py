"""What `bench/run_on_gpu.py` runs on a rented GPU: groups of items, each group in a process of its own.

A part (correctness, kernels, step, data) has groups, a group has items, and an item leaves one line of JSON. `plan`
lists the groups in order of importance, `child` runs one, and the modules named after the parts say what items do.
"""
