"""What went wrong, in the user's terms: one line, which the command line prints without a traceback."""


class OptimaError(Exception):
    """Bad input or a run that cannot go on. The message says what was given and what would be right."""
