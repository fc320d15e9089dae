"""Where pictures and texts come from: the embedded data set and the tokenizers."""
