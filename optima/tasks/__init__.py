"""Tasks on data sets: what a model shows the objective, and how predictions are scored."""
