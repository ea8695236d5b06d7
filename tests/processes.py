"""What our commands print, run as processes of their own."""

import re

# jax's CUDA plugin, which the tests install to compile for GPUs, says on a machine without CUDA
# that there is none; no log level silences it.
_PLUGIN = re.compile(
    r"^(WARNING: All log messages before absl::InitializeLog.*|[IW]\d{4} .*cudart_stub\.cc.*)\n",
    re.MULTILINE,
)


def without_plugin_log(stderr: str) -> str:
    """Return what our own code printed."""
    return _PLUGIN.sub("", stderr)
