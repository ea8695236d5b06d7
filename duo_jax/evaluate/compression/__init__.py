"""Baselines that keep a text in another form: thinner keys, low rank, shared heads."""

from duo_jax.evaluate.compression.chai import CHAI
from duo_jax.evaluate.compression.method import Compression, Shape
from duo_jax.evaluate.compression.runner import predict
from duo_jax.evaluate.compression.shadowkv import ShadowKV
from duo_jax.evaluate.compression.think import ThinK

__all__ = ["CHAI", "Compression", "ShadowKV", "Shape", "ThinK", "predict"]
