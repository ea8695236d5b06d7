"""A model to talk to: text in, text out.

model = duo_jax.load("path/or/hub-name", pattern="path/to/pattern", sparsity=0.5)
model.generate(["Once upon a time"], max_new_tokens=64)
for text in model.stream("Once upon a time"):
    print(text, end="", flush=True)

book = model.conversation()
book.append(pathlib.Path("book.txt").read_text())
book.generate("Who did it?")  # reads only the question
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool

from duo_jax.cache import check_kv
from duo_jax.checkpoints import pretrained
from duo_jax.errors import InputError
from duo_jax.heads import split
from duo_jax.heads.pattern import Pattern, check_fits, choose_retrieval_heads, load_pattern
from duo_jax.heads.split import DuoConfig
from duo_jax.model.config import ModelConfig
from duo_jax.model.quantised_weights import check_format
from duo_jax.serve.sampling import SamplingConfig
from duo_jax.session.conversation import Conversation, load_conversation
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Progress, Session
from duo_jax.session.tokenization import Tokenization, load_tokenization
from duo_jax.session.writing import SEGMENT, write_text

NO_PATTERN = "none"
DEFAULT_SPARSITY = 0.5
_OWN_PATTERN = "pattern"  # a folder in a model's folder


def load(
    model: str | pathlib.Path,
    *,
    pattern: str | pathlib.Path | Pattern | None = None,
    sparsity: float | None = None,
    threshold: float | None = None,
    sink: int | None = None,
    recent: int | None = None,
    dtype: DTypeLike | None = None,
    weights: str = "model",
    kv: str = "model",
    prefill_chunk: int = 8192,
    prefill_mode: str = "exact",
    implementation: str = "auto",
) -> "DuoModel":
    """Load a model and split its heads.

    Args:
      model: a Hugging Face folder, a hub name, a converted checkpoint, or "demo".
      pattern: a pattern or its folder; "none" is the model as published, every head with a full
        cache. Default: the folder "pattern" of the model itself, where it has one.
      sparsity: fraction of streaming heads, in [0, 1]; default 0.5.
      threshold: instead of a sparsity, the gate above which a head is a retrieval head.
      sink: first tokens that a streaming head keeps; default: the pattern's.
      recent: latest tokens that a streaming head keeps; default: the pattern's.
      dtype: of weights, activations and caches; default: as stored, on CPU float32.
      weights: format of the layers' projections: "model" (the dtype), "int8", "w8a8" or "int4", see
        `duo_jax.model.quantised_weights`.
      kv: format of the caches: "model" (the dtype), "bf16", "int8", "int4" or "int2", see
        `duo_jax.cache`.
      prefill_chunk: tokens of a prompt that are read at a time.
      prefill_mode: "exact" or "chunk", see `duo_jax.serve`.
      implementation: of attention: "auto", "xla", "triton" or "interpret", see `kernels.dispatch`.

    Raises:
      InputError: something cannot be used; the message is one line.
    """
    check_format(weights)
    folder = pretrained.resolve(model)
    architecture = pretrained.load_config(folder)
    config, heads = split_heads(
        architecture, folder, pattern, sparsity=sparsity, threshold=threshold, sizes=(sink, recent)
    )
    tokenization = load_tokenization(folder)
    if dtype is None and jax.default_backend() == "cpu":
        dtype = np.float32  # CPUs compute in half precision by converting every number
    check_kv(config, kv)
    params = pretrained.load_split_params(folder, heads, dtype=dtype, weights=weights)
    runtime = Runtime(
        config=config,
        params=params,
        prefill_chunk=prefill_chunk,
        prefill_mode=prefill_mode,
        implementation=implementation,
        kv=kv,
    )
    return DuoModel(runtime=runtime, tokenization=tokenization)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DuoModel:
    """A split model with its tokenizer; made by `load`."""

    runtime: Runtime
    tokenization: Tokenization

    @property
    def config(self) -> DuoConfig:
        """Architecture, retrieval heads per layer, sink and recent sizes."""
        return self.runtime.config

    @property
    def params(self) -> dict[str, Any]:
        """Parameters in serving form, for the pure functions of `duo_jax.serve`."""
        return self.runtime.params

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self.tokenization.tokenizer

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Continue several prompts, of any lengths, in one batch.

        Args:
          prompts: texts.
          max_new_tokens: most tokens per prompt.
          stop: string or strings at which a text stops; they are not returned.
          seed: of the random draws; the same seed gives the same texts.
          progress: called while prompts are read, with tokens read and to be read.
          **sampling: temperature, top_k, top_p, min_p, repetition_penalty
            (`duo_jax.serve.sampling.SamplingConfig`); default greedy.

        Returns:
          What was written after each prompt.

        Raises:
          InputError: there is no prompt, one is empty, or one is too long.
        """
        if isinstance(prompts, str):
            raise InputError("prompts must be a list of texts; of one text, [text]")
        if not prompts:
            raise InputError("there is no prompt")
        config = SamplingConfig(**sampling)
        session = Session(self.runtime, batch_size=len(prompts))
        tokens = [self.tokenization.encode(prompt) for prompt in prompts]
        session.append(tokens, room=max_new_tokens, progress=progress)
        texts = [""] * len(prompts)
        for pieces in write_text(
            session,
            self.tokenization,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            sampling=config,
            segment=SEGMENT,
        ):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """Continue one prompt; yield text as it is written. Settings as of `generate`."""
        return self.conversation().stream(prompt, **settings)

    def conversation(self, *, max_len: int | None = None) -> Conversation:
        """Begin a text or chat that goes on over several turns.

        Args:
          max_len: tokens the cache can hold; default: it grows with the text.
        """
        return Conversation(self.runtime, self.tokenization, max_len=max_len)

    def load_conversation(
        self, folder: str | pathlib.Path, *, max_len: int | None = None
    ) -> Conversation:
        """Load what `Conversation.save` wrote; nothing is read again.

        Raises:
          InputError: it belongs to another model, pattern or version, or is damaged.
        """
        return load_conversation(folder, self.runtime, self.tokenization, max_len=max_len)


def split_heads(
    model: ModelConfig,
    folder: pathlib.Path,
    pattern: str | pathlib.Path | Pattern | None,
    *,
    sparsity: float | None,
    threshold: float | None,
    sizes: tuple[int | None, int | None] = (None, None),
) -> tuple[DuoConfig, Bool[np.ndarray, "layers kv_heads"]]:
    """Choose the retrieval heads of a model; `pattern`, `sparsity`, `threshold` as of `load`.

    Args:
      model: the architecture.
      folder: where the model's own pattern may lie.
      pattern: a pattern, its folder, "none" or None.
      sparsity: fraction of streaming heads.
      threshold: instead of it.
      sizes: sink and recent; None: the pattern's.

    Raises:
      InputError: there is no pattern, it does not fit, or a number is out of range.
    """
    if sparsity is not None and threshold is not None:
        raise InputError("give a sparsity or a threshold, not both")
    if pattern is None:
        pattern = folder / _OWN_PATTERN
        if not pattern.is_dir():
            raise InputError(
                f"{folder} brings no pattern of its own: name a pattern folder (python -m "
                'train.identify makes one), or "none" for the model as published'
            )
    if pattern == NO_PATTERN:
        if sparsity or threshold is not None:
            raise InputError("without a pattern there is no sparsity or threshold to choose")
        heads = np.ones((model.num_layers, model.num_kv_heads), bool)
        learned = None
    else:
        learned = pattern if isinstance(pattern, Pattern) else load_pattern(pattern)
        check_fits(learned, num_layers=model.num_layers, num_kv_heads=model.num_kv_heads)
        if threshold is not None:
            if not 0 <= threshold <= 1:
                raise InputError(f"threshold {threshold} is not in [0, 1]")
            heads = learned.clipped() > threshold
        else:
            chosen = DEFAULT_SPARSITY if sparsity is None else sparsity
            heads = choose_retrieval_heads(learned.gates, sparsity=chosen)
    sink, recent = sizes
    defaults = DuoConfig(architecture=model, retrieval_counts=(0,) * model.num_layers)
    if learned is not None:
        defaults = dataclasses.replace(
            defaults, sink_size=learned.sink_size, recent_size=learned.recent_size
        )
    config = split.duo_config(
        model,
        heads,
        sink_size=defaults.sink_size if sink is None else sink,
        recent_size=defaults.recent_size if recent is None else recent,
    )
    return config, heads
