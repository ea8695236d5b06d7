"""Does a model survive its pattern? Needles, lm-evaluation-harness tasks, and other methods."""
