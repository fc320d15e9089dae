"""The command `distill_hf`: what it takes, and its work, which is imported when it is called."""
