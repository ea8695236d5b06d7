"""The Python interface: load a split model; text in, text out.

model = duo_jax.load("path/or/hub-name", pattern="path/to/pattern", sparsity=0.5)
model.generate(["Once upon a time"], max_new_tokens=64)
for text in model.stream("Once upon a time"):
    print(text, end="", flush=True)

book = model.conversation()
book.append(pathlib.Path("book.txt").read_text())
book.generate("Who did it?")  # reads only the question
"""

import dataclasses
import functools
import pathlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from duo_jax.cache import check_kv_format
from duo_jax.checkpoints import pretrained
from duo_jax.checkpoints.own_pattern import find_pattern
from duo_jax.checkpoints.weights import open_weights
from duo_jax.errors import InputError, quoted
from duo_jax.heads.choose import split_heads
from duo_jax.heads.pattern import Pattern
from duo_jax.heads.reconstruction import Instruction
from duo_jax.heads.split import DuoConfig
from duo_jax.model.quantised_weights import check_weight_format
from duo_jax.schema.check import argument
from duo_jax.schema.kinds import Count, Share
from duo_jax.serve.sampling import sampling_config
from duo_jax.session.conversation import Conversation, load_conversation
from duo_jax.session.devices import choose
from duo_jax.session.row_cache import Progress
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from duo_jax.session.text import write_text
from duo_jax.session.tokenization import Tokenization, load_tokenization


def load(
    model: str | pathlib.Path,
    *,
    pattern: str | pathlib.Path | Pattern | None = None,
    sparsity: float | None = None,
    threshold: float | None = None,
    sink_size: int | None = None,
    recent_size: int | None = None,
    dtype: DTypeLike | None = None,
    weights: str = "model",
    kv: str = "model",
    keep: float = 1.0,
    keep_by: str = "snapkv",
    prefill_chunk: int = 8192,
    prefill_mode: str = "exact",
    implementation: str = "auto",
    devices: int | None = None,
    groups: int = 1,
) -> "DuoModel":
    """Load a model and split its heads.

    Args:
      model: a Hugging Face folder, a GGUF file, a hub name, a converted checkpoint, or "demo".
      pattern: a pattern or its folder; "none" is the model as published, every head with a full
        cache. Default: the model's own pattern, or one that ships with duo_jax for this model
        (found by its weights, whatever its name and format).
      sparsity: fraction of streaming heads, in [0, 1]; default 0.5.
      threshold: instead of a sparsity, the gate above which a head is a retrieval head.
      sink_size: first tokens that a streaming head keeps; default: the pattern's.
      recent_size: latest tokens that a streaming head keeps; default: the pattern's.
      dtype: data type of weights, activations and caches; default: as stored, float32 on a CPU.
      weights: format of the layers' projections: "model" (the dtype), "int8", "w8a8" or "int4"
        (`duo_jax.model.quantised_weights`).
      kv: format of the caches: "model" (the dtype), "bf16", "int8", "int4" or "int2"
        (`duo_jax.cache`).
      keep: fraction of the tokens read that a retrieval head keeps, above 0; the others are evicted
        before anything is written, and their bytes freed. Not with "int2".
      keep_by: which tokens those are: "snapkv", what the end of the text looks at, or "kvzip", what
        the model needs to repeat the text, for questions that come later
        (`duo_jax.session.eviction`).
      prefill_chunk: number of prompt tokens read at a time.
      prefill_mode: what streaming heads see while a prompt is read, "exact" or "chunk"
        (`duo_jax.serve.forward`).
      implementation: attention implementation, "auto", "xla", "triton", "mosaic" or, for tests,
        "interpret" and "interpret_mosaic" (`kernels.dispatch`).
      devices: number of devices that share weights, caches and work (`duo_jax.mesh`); default: all
        GPUs if one cannot hold the weights and a cache of the model's range, else one.
      groups: groups of these devices that each hold the whole model, and serve an equal share of
        the rows of a batch.

    Raises:
      InputError: an argument cannot be used; the message is one line.
    """
    weight_format = check_weight_format(weights)
    dtype = _check_dtype(dtype)
    folder = pretrained.resolve(model)
    weight_files = open_weights(folder)
    architecture = weight_files.architecture
    config, heads = split_heads(
        architecture,
        find_pattern(folder, architecture) if pattern is None else pattern,
        sparsity=sparsity,
        threshold=threshold,
        sink_size=sink_size,
        recent_size=recent_size,
    )
    tokenization = dataclasses.replace(
        load_tokenization(folder), max_tokens=architecture.max_positions
    )
    if dtype is None and jax.default_backend() == "cpu":
        dtype = np.float32  # CPUs compute in half precision by converting every number
    check_kv_format(config, kv)
    keep = argument("keep", keep, Share)
    plain = weight_files.dtype(weight_files.tensors[0]) if dtype is None else dtype
    mesh = choose(devices, config, groups=groups, dtype=plain, weights=weight_format, kv=kv)
    params = pretrained.load_split_params(
        weight_files, heads, dtype=dtype, weights=weight_format, mesh=mesh
    )
    instruction = None
    if keep < 1 and keep_by == "kvzip":
        instruction = Instruction.of(functools.partial(tokenization.encode, continues=True))
    runtime = Runtime(
        config=config,
        params=params,
        prefill_chunk=prefill_chunk,
        prefill_mode=prefill_mode,
        implementation=implementation,
        kv_format=kv,
        keep=keep,
        keep_by=keep_by,
        instruction=instruction,
        mesh=mesh,
    )
    return DuoModel(runtime=runtime, tokenization=tokenization)


def _check_dtype(dtype: Any) -> Any:
    """Return a floating data type, or None.

    Raises:
      InputError: it is none.
    """
    try:
        if dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            return dtype
    except Exception:  # numpy has its own language of types, with errors of many kinds
        pass
    raise InputError(f"dtype {quoted(dtype)} is no floating type, such as bfloat16 or float32")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DuoModel:
    """A split model with its tokenizer; made by `load`."""

    runtime: Runtime
    tokenization: Tokenization

    @property
    def config(self) -> DuoConfig:
        """Architecture, number of retrieval heads per layer, sink and recent sizes."""
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
        prompts: Iterable[str],
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
          max_new_tokens: maximum number of new tokens per prompt.
          stop: string or strings at which a text stops; they are not returned.
          seed: random seed; the same seed gives the same texts.
          progress: called while prompts are read, with tokens read and tokens to read.
          **sampling: temperature, top_k, top_p, min_p, repetition_penalty
            (`duo_jax.SamplingConfig`); default: greedy.

        Returns:
          The continuation of each prompt, without the prompt.

        Raises:
          InputError: there is no prompt, one is empty, or one is too long.
        """
        one = isinstance(prompts, str | bytes | Mapping) or getattr(prompts, "ndim", 1) == 0
        if one or not isinstance(prompts, Iterable):
            raise InputError("prompts must be a list of texts, such as [text]")
        prompts = list(prompts)
        if not prompts:
            raise InputError("there is no prompt")
        max_new_tokens = argument("max_new_tokens", max_new_tokens, Count)
        config = sampling_config(sampling)
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
        ):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def stream(self, prompt: str, **settings: Any) -> Generator[str, None, None]:
        """Continue one prompt, and yield text as it is written; settings as in `generate`."""
        return self.conversation().stream(prompt, **settings)

    def conversation(
        self,
        *,
        max_len: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Conversation:
        """Begin a text or chat of several turns.

        Args:
          max_len: tokens the cache can hold; default: it grows with the text.
          chat_template_kwargs: variables for the chat template, as {"enable_thinking": False}.
        """
        return Conversation(
            self.runtime,
            self.tokenization,
            max_len=max_len,
            chat_template_kwargs=chat_template_kwargs,
        )

    def load_conversation(
        self,
        folder: str | pathlib.Path,
        *,
        max_len: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Conversation:
        """Load a conversation that `Conversation.save` wrote; its text is not read again.

        Args:
          folder: the saved conversation.
          max_len: as in `conversation`.
          chat_template_kwargs: as in `conversation`; default: those that were saved.

        Raises:
          InputError: the folder belongs to another model, pattern or version, or is damaged.
        """
        return load_conversation(
            folder,
            self.runtime,
            self.tokenization,
            max_len=max_len,
            chat_template_kwargs=chat_template_kwargs,
        )
