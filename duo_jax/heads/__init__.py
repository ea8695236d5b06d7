"""Which KV heads are retrieval heads: patterns, their binarisation, parameters in that order."""
