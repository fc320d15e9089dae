"""Data sets, the embedded one and those that are files; how they are loaded and packed; and the tokenizers."""
