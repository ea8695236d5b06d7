"""llama.cpp through llama-cpp-python, on a GGUF file as it is; in an environment of its own."""

import itertools
import pathlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from benchmarks.contenders import answering


class LlamaCpp:
    """A model with weights in the file's formats and a float16 cache, llama.cpp's default."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]: it has an environment of its own

        self._file = pathlib.Path(settings["model"])
        self._model = llama_cpp.Llama(
            str(self._file),
            n_ctx=settings["context"],
            n_threads=settings["threads"],
            n_threads_batch=settings["threads"],
            verbose=False,
        )
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        self._model.reset()  # it would keep what both texts begin with
        written = self._model.generate(tokens, top_k=1, temp=0.0, repeat_penalty=1.0)
        yield from itertools.islice(written, count)

    def warm_up(self, tokens: list[int], count: int) -> None:
        """Run a little; nothing is compiled."""
        list(self.generate(tokens[:64], min(count, 3)))

    def step_bytes(self, context: int) -> int:
        """Count the whole file: vocabulary and one row of an untied embedding are small beside."""
        known = self._model.metadata
        name = known["general.architecture"]
        layers, heads, kv_heads, embed = (
            int(known[f"{name}.{key}"])
            for key in (
                "block_count",
                "attention.head_count",
                "attention.head_count_kv",
                "embedding_length",
            )
        )
        return self._file.stat().st_size + 2 * 2 * layers * kv_heads * embed // heads * context


if __name__ == "__main__":
    answering.answer(LlamaCpp)
