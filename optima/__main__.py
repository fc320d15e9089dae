"""`python -m optima`."""

from optima.run import door

door()
