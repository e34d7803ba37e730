"""Where models come from: names, builders, checkpoints, and an input to try them with."""
