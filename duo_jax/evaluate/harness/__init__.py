"""Tasks of lm-evaluation-harness, answered from the caches that serve a split model."""
