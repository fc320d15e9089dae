"""Bandit policies compared in made-up worlds: `optima simulate`.

This is how a policy is picked for a number of modules and rounds before a real run is paid for, and how the default
hyper-parameters of `optima_core.bandit` were chosen.
"""
