"""Token-eviction baselines: each head keeps some tokens of a text and forgets the others."""

from duo_jax.evaluate.eviction.fastgen import FastGen
from duo_jax.evaluate.eviction.h2o import H2O
from duo_jax.evaluate.eviction.headkv import HeadKV
from duo_jax.evaluate.eviction.kvzip import KVzip
from duo_jax.evaluate.eviction.policy import Policy
from duo_jax.evaluate.eviction.runner import Predicted, predict
from duo_jax.evaluate.eviction.snapkv import SnapKV
from duo_jax.evaluate.eviction.tova import TOVA

__all__ = ["H2O", "TOVA", "FastGen", "HeadKV", "KVzip", "Policy", "Predicted", "SnapKV", "predict"]
