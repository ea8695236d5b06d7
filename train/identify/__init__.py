"""`python -m train.identify`: learn one gate per KV head and report what the pattern is worth."""

from train.identify.flags import IdentifyConfig, default_config
from train.identify.run import identify

__all__ = ["IdentifyConfig", "default_config", "identify"]
