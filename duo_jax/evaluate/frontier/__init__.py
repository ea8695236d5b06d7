"""`python -m duo_jax.evaluate frontier`: what is the best way to spend some bytes of cache."""
