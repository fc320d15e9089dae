"""`python -m optima`."""

from optima.run import door

if __name__ == "__main__":
    door()
