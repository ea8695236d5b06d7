"""Python imports this at its start where this folder is on PYTHONPATH: jax has no Triton then."""

import sys

sys.modules["jax.experimental.pallas.triton"] = None  # importing it raises ImportError
