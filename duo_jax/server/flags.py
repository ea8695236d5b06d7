"""The flags of the server."""

import dataclasses
import pathlib
from typing import Annotated

import tyro
from msgspec import Meta

from duo_jax import files
from duo_jax.cli.model_flags import ModelFlags
from duo_jax.errors import InputError
from duo_jax.schema.kinds import Count, Few, NotNegative, Share, Size
from duo_jax.serve import PrefillMode
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.session.runtime import KeepBy

_MOST_KEYS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerFlags(ModelFlags):
    """Flags of the command."""

    # Fixed: an engine decides itself how prompts are cut, and shares what was read.
    prefill_mode: Annotated[PrefillMode, tyro.conf.Suppress] = "exact"
    keep: Annotated[Share, tyro.conf.Suppress] = 1.0
    keep_by: Annotated[KeepBy, tyro.conf.Suppress] = "snapkv"

    host: str = "127.0.0.1"
    """Address to listen at: by default only for programs on this machine. 0.0.0.0: for everybody
    who reaches it; then set --api-keys."""
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8000
    """Port; 0: any that is free."""
    api_keys: pathlib.Path | None = None
    """File with the keys that clients may use, one a line; lines that begin with # are comments.
    Default: no key is needed."""
    served_model_name: str | None = None
    """Name of the model for clients. Default: the last part of --model."""

    max_requests: Few = 16
    """Requests that are answered at the same time."""
    max_len: Count | None = None
    """Tokens of a request, prompt and answer. Default: the model's range, or what fits."""
    cache_tokens: Count | None = None
    """Tokens that the caches hold, of all requests and kept prompts together. Default: as many as
    all requests at once may need, or as fit into a share of the free memory (85% of a GPU's, 25% of
    a computer's)."""
    page_size: Count = 64
    """Tokens of a page of the cache, a power of two from 64 on."""
    queue: Count = 256
    """Requests that may wait; further ones are refused (429)."""
    prefix_reuse: bool = True
    """Keep the caches of prompts, for later ones that begin alike."""
    snapshots: Size = 32
    """Maximum number of beginnings of prompts that are kept."""
    pin: tuple[pathlib.Path, ...] = ()
    """Folders that `python -m duo_jax.generate --save-cache` wrote: their texts are
    kept for good, and never read again."""
    warm_up: bool = True
    """Compile programs for requests of all sizes before the server is ready."""
    prefill_chunk: Count = 1024
    """Number of prompt tokens read at a time; meanwhile, streams of other requests stand still."""

    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: SamplingConfig(temperature=1.0)
    )
    """Where a request does not say. By default as the model's generation_config.json suggests, and
    otherwise OpenAI's temperature of 1."""

    drain_seconds: NotNegative = 30.0
    """Seconds that running requests have to end after SIGTERM or Ctrl-C."""
    max_body_bytes: Count = 16 * 2**20
    """Largest body of a request; a larger one is refused (413)."""
    access_log: bool = False
    """Print a line for every request."""

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.served_model_name or pathlib.Path(self.model).name or self.model

    def keys(self) -> frozenset[str]:
        """Return the keys that clients may use; none: no key is needed.

        Raises:
          InputError: the file cannot be read, or holds no key.
        """
        if self.api_keys is None:
            return frozenset()
        lines = files.read_text(self.api_keys).removeprefix("\ufeff").splitlines()
        stripped = (line.strip() for line in lines)
        found = frozenset(line for line in stripped if line and not line.startswith("#"))
        if not found or len(found) > _MOST_KEYS:
            raise InputError(f"{files.shown(self.api_keys)} holds {len(found):,} keys")
        return found
