"""Module-wise distillation of any torch model: taps, objective, bandit, engine. Knows losses, knows nothing of CoCa."""
