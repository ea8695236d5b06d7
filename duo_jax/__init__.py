"""DuoAttention in JAX: models whose KV heads are split into retrieval and streaming heads."""
