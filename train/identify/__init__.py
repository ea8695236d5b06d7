"""`python -m train.identify`: learn one gate per KV head and report what the pattern is worth."""
