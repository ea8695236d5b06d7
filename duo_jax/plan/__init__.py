"""Planner: the longest context that fits on a GPU in every setting, from a config.json alone.

    python -m duo_jax.plan --model M --gpu a100-80g --pattern P

Nothing is loaded and no GPU is needed. Weights and caches are counted from the shapes that the
model is served with, to the byte; workspace is estimated (duo_jax.plan.workspace), and can be
compared with what the compiler lays out (duo_jax.plan.verify).
"""
