"""The demo model: a tiny Llama that retrieves, trained from scratch, shipped with duo_jax."""
