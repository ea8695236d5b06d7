"""What a pattern costs: needles, lm-evaluation-harness tasks, and other methods."""
