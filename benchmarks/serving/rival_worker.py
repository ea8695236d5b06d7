"""The PyTorch side of the benchmarks: a process that measures one library on request.

    python -m benchmarks.serving.rival_worker transformers MODEL_FOLDER DTYPE THREADS

Prints one line of JSON when the model is loaded, then answers every line of JSON on its standard
input with one on its standard output (see benchmarks.serving.rivals, which starts it). It runs in
an environment that may have neither jax nor duo_jax, so it imports nothing of this project.

Decoding is timed from a cache that was filled with random keys and values: what a step costs does
not depend on what the cache holds, and reading a long prompt takes minutes on a CPU.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import transformers

# Of keys and values; this much is drawn and repeated, since drawing all takes longer than timing.
_RANDOM_TOKENS = 512
_WARMUP_TOKENS = 64  # read before anything is timed, so that libraries have set themselves up


class Transformers:
    """Full attention as transformers does it: sdpa, with the cache that the request names."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
        ).eval()

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def decode(self, *, cache: str, context: int, warmup: int, steps: int) -> dict[str, Any]:
        """Time steps after `context` tokens."""
        filled = self._filled(self._empty(cache, context + warmup + steps), context)
        seconds = self._steps(filled, warmup + steps)[warmup:]
        return {"seconds": seconds, "cache_bytes": _cache_bytes(filled)}

    def prefill(self, *, length: int) -> dict[str, Any]:
        """Time one prompt, read at once into a DynamicCache."""
        cache, tokens = transformers.DynamicCache(), self._tokens(length)
        seconds = _timed(lambda: self._forward(tokens, cache))
        return {"seconds": seconds, "cache_bytes": _cache_bytes(cache)}

    def _empty(self, cache: str, max_len: int) -> transformers.Cache:
        if cache == "StaticCache":
            return transformers.StaticCache(config=self.model.config, max_cache_len=max_len)
        return transformers.DynamicCache()

    def _filled(self, cache: transformers.Cache, context: int) -> transformers.Cache:
        config = self.model.config
        shape = (1, config.num_key_value_heads, min(context, _RANDOM_TOKENS), config.head_dim)
        repeats = -(-context // shape[2])
        for layer in range(config.num_hidden_layers):
            keys, values = (
                torch.randn(shape, dtype=self.model.dtype).repeat(1, 1, repeats, 1)[:, :, :context]
                for _ in range(2)
            )
            cache.update(keys, values, layer)
        return cache

    def _steps(self, cache: transformers.Cache, count: int) -> list[float]:
        token = self._tokens(1)
        return [_timed(lambda: self._forward(token, cache)) for _ in range(count)]

    def _forward(self, tokens: torch.Tensor, cache: transformers.Cache) -> None:
        self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _tokens(self, length: int) -> torch.Tensor:
        return torch.randint(self.model.config.vocab_size, (1, length))


class KVPress(Transformers):
    """DuoAttentionPress of kvpress.

    It reads the prompt with full attention. Then it drops nothing: it remembers the indices of the
    tokens between sinks and recents of its streaming heads, and overwrites their keys in the full
    cache at every decoded token, by a key that no query of that token looks at. The window does not
    slide: all new tokens stay visible.
    """

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return super().versions() | {"kvpress": version("kvpress")}

    def decode(
        self, *, retrieval_heads: Sequence[int], sink: int, recent: int,
        context: int, warmup: int, steps: int
    ) -> dict[str, Any]:  # fmt: skip
        press = self._press(retrieval_heads, sink, recent)
        press.post_init_from_model(self.model)
        cache = self._filled(transformers.DynamicCache(), context)
        layers = [layer.self_attn for layer in self.model.model.layers]
        for attention, cached in zip(layers, _layers(cache), strict=True):
            # What the press does at the end of a prompt.
            cached.keys, cached.values = press.compress(
                attention, None, cached.keys, cached.values, None, {}
            )
        seconds = self._steps(cache, warmup + steps)[warmup:]
        indices = [getattr(attention, "masked_key_indices", None) for attention in layers]
        index_bytes = sum(index.nbytes for found in indices for index in found or ())
        for attention in layers:
            attention.masked_key_indices = None
        return {
            "seconds": seconds,
            "cache_bytes": _cache_bytes(cache),
            "index_bytes": index_bytes,
        }

    def prefill(
        self, *, retrieval_heads: Sequence[int], sink: int, recent: int, length: int
    ) -> dict[str, Any]:
        with self._press(retrieval_heads, sink, recent)(self.model):
            return super().prefill(length=length)

    def _press(self, retrieval_heads: Sequence[int], sink: int, recent: int):
        import kvpress  # pyright: ignore[reportMissingImports]: it has an environment of its own
        import numpy as np

        num_kv_heads = self.model.config.num_key_value_heads
        gates = np.arange(num_kv_heads)[None, :] < np.array(retrieval_heads)[:, None]

        class Press(kvpress.DuoAttentionPress):
            """Takes our split instead of downloading a pattern."""

            @staticmethod
            def load_attention_pattern(model):
                del model
                return sink, recent, gates.astype(float)

        return Press(head_compression_ratio=1.0 - gates.mean())


_LIBRARIES: dict[str, type[Transformers]] = {"transformers": Transformers, "kvpress": KVPress}


def main(library: str, folder: str, dtype: str, threads: str) -> None:
    """Load the model, then answer requests until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    rival = _LIBRARIES[library](folder, dtype)
    print(json.dumps(rival.versions()), file=answers, flush=True)
    with torch.inference_mode():
        Transformers.prefill(rival, length=_WARMUP_TOKENS)
        for line in sys.stdin:
            request = json.loads(line)
            method = getattr(rival, request.pop("measure"))
            print(json.dumps(method(**request)), file=answers, flush=True)


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _layers(cache: transformers.Cache) -> list[Any]:
    """Return the layers, all of which hold keys and values."""
    return cast(list[Any], cache.layers)


def _cache_bytes(cache: transformers.Cache) -> int:
    """Return the bytes that keys and values occupy, views counted as what they keep alive."""
    buffers = [part for layer in _layers(cache) for part in (layer.keys, layer.values)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in buffers}
    return sum(storage.nbytes() for storage in storages.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
