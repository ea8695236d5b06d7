"""transformers without a compiler: sdpa attention, and a cache that grows or has a fixed size."""

import pathlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from benchmarks.contenders import answering


class Eager:
    """A model in float32, with the cache that the settings name."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        path, file = pathlib.Path(settings["model"]), {}
        if path.is_file():
            path, file = path.parent, {"gguf_file": path.name}
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, **file
        ).eval()
        self._static = settings["cache"] == "StaticCache"
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        """Do what its own `generate` does, without looking for ends and without its options."""
        cache: transformers.Cache = transformers.DynamicCache()
        if self._static:
            most = len(tokens) + count
            cache = transformers.StaticCache(config=self._model.config, max_cache_len=most)
        unread = torch.tensor([tokens])
        for _ in range(count):
            out = self._model(
                input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            unread = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            yield int(unread)

    def warm_up(self, tokens: list[int], count: int) -> None:
        """Run a little; nothing is compiled."""
        list(self.generate(tokens[:64], min(count, 3)))

    def step_bytes(self, context: int) -> int:
        config = self._model.config
        weights = sum(x.nbytes for x in self._model.parameters())  # a tied one counts once
        if not config.tie_word_embeddings:  # one row of it is read
            table = self._model.get_input_embeddings()
            weights -= sum(x.nbytes for x in table.parameters())
        heads = config.num_hidden_layers * config.num_key_value_heads
        return weights + 2 * 4 * heads * config.head_dim * context


if __name__ == "__main__":
    answering.answer(Eager)
