"""The words after `python -m optima.run`: a file a command, and how words become a configuration."""
