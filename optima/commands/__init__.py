"""The commands of the command line, a file or a folder each."""
