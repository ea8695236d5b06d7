"""Tasks of lm-evaluation-harness, through both caches."""
