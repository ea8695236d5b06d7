"""Learning which KV heads are retrieval heads."""
