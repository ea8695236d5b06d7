r"""A split model behind lm-evaluation-harness's interface; importing it registers "duo_jax".

    python -c "import duo_jax.evaluate.lm_eval_model, lm_eval.__main__ as m; m.cli_evaluate()" \
        --model duo_jax --model_args model=FOLDER,pattern=FOLDER,sparsity=0.5 --tasks mmlu

`lm_eval` alone finds only the models of its own list: it has no entry points, and its
--include_path is for tasks. Every flag of `LmEvalFlags` is a model argument.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import truncate_tokens
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from duo_jax.api import DuoModel
from duo_jax.data import tokenizer_calls
from duo_jax.errors import InputError
from duo_jax.evaluate.harness import continuations
from duo_jax.evaluate.harness.continuations import CacheSize
from duo_jax.evaluate.harness.flags import LmEvalFlags
from duo_jax.evaluate.harness.generation import Generation, read_arguments
from duo_jax.evaluate.results import describe
from duo_jax.heads.choose import NO_PATTERN
from duo_jax.session.text import write_text

# A request's texts (None: part of a longer text), its context and its continuation.
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


class DuoLM(TemplateLM):
    """Answers the harness's requests from the caches that serve a split model.

    Args:
      model: the split model.
      flags: how it was loaded, and how contexts are read.
      seed: random seed, for tasks that sample.
    """

    def __init__(self, model: DuoModel, flags: LmEvalFlags, *, seed: int = 0) -> None:
        super().__init__()
        longest = model.config.architecture.max_positions
        if flags.max_length is not None and flags.max_length > longest:
            raise InputError(
                f"max_length {flags.max_length:,} is beyond the model's range of {longest:,}"
            )
        self.model = model
        self.flags = flags
        self.max_length = flags.max_length or longest
        self.largest_cache: CacheSize | None = None
        self._seed = seed  # for the next batch that is generated

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "DuoLM":
        """Load a model from "model=...,pattern=...,sparsity=0.5"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "DuoLM":
        """Load a model from the flags of `LmEvalFlags`.

        Only the batch size of `additional_config` is read: the device is jax's choice, and lm-eval
        says "cuda:0" whether there is one or not.

        Raises:
          InputError: one of them does not exist or cannot be used.
        """
        values = dict(arg_dict)
        if (batch_size := (additional_config or {}).get("batch_size")) is not None:
            values["batch_size"] = batch_size
        names = [field.name for field in dataclasses.fields(LmEvalFlags)]
        unknown = sorted(values.keys() - set(names))
        if unknown:
            raise InputError(
                f"{', '.join(unknown)}: not an argument of duo_jax, which are {', '.join(names)}"
            )
        if "pattern" in values and values["pattern"] is None:
            values["pattern"] = NO_PATTERN  # lm-eval turns the word "none" into None
        for name, number in (("sparsity", float), ("threshold", float), ("batch_size", int)):
            if values.get(name) is not None:
                values[name] = _number(name, values[name], number)
        flags = LmEvalFlags(**values)
        return cls(flags.load(), flags)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; the base class asks for it."""
        return self.model.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, a part of lm-eval's keys of cached requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        stops = self.model.tokenization.stop_tokens
        if not stops:
            raise InputError("the model names no end-of-text token (eos_token_id in config.json)")
        token = self.tokenizer.eos_token_id
        return stops[0] if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokenise; by default with the tokenizer's special tokens, but no second BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return tokenizer_calls.encode(self.tokenizer, string, special=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat; a template that has no system role gets the chat without it.

        Raises:
          InputError: the model has no chat template, or it cannot render this.
        """
        if not self.tokenizer.chat_template:
            raise InputError("this model has no chat template; leave out --apply-chat-template")

        def rendered(messages: list[dict[str, str]]) -> str:
            return self.model.tokenization.render_chat(
                messages, answer=add_generation_prompt, continues=not add_generation_prompt
            )

        try:
            return rendered(chat_history)
        except InputError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            return rendered(others)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows as lm-eval cuts them."""
        windows: list[_Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in cut]
            windows += parts
            counts.append(len(parts))
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts; requests with equal settings share batches, the longest first."""
        asked: list[tuple[Any, ...]] = [request.args for request in requests]
        contexts = [self.tok_encode(text) or [self.prefix_token_id] for text, _ in asked]
        alike: dict[str, list[int]] = {}
        for i in sorted(range(len(requests)), key=lambda i: -len(contexts[i])):
            alike.setdefault(json.dumps(asked[i][1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        with _bar("texts", len(requests), disable_tqdm) as bar:
            for order in alike.values():
                writing = read_arguments(asked[order[0]][1])
                for batch in _batches(order, self.flags.batch_size):
                    written = self._write([contexts[i] for i in batch], writing)
                    for i, text in zip(batch, written, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", asked[i], text)
                    bar.update(len(batch))
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """Return the settings that lm-eval writes beside its results; called at the end."""
        cache = self.largest_cache
        return describe.settings(self.flags, self.model) | {
            "decode_last": self.flags.decode_last,
            "truncate": self.flags.truncate,
            "max_length": self.max_length,
            "batch_size": self.flags.batch_size,
            "cache_bytes_per_row": cache and cache.row_bytes,
            "cache_tokens_per_row": cache and cache.row_tokens,
        }

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations, the longest contexts first, equal contexts side by side."""
        # The last token is predicted, not read.
        pairs = [(tuple(self._cut(c, len(new) - 1)), new) for _, c, new in requests]
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), *pairs[i]))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        with _bar("log-likelihoods", len(pairs), disable_tqdm) as bar:
            for batch in _batches(order, self.flags.batch_size):
                scores = continuations.score(
                    self.model.runtime,
                    [pairs[i] for i in batch],
                    decode_last=self.flags.decode_last,
                )
                self._saw(scores.cache)
                for i, logprob, greedy in zip(batch, scores.logprobs, scores.greedy, strict=True):
                    answers[i] = (float(logprob), bool(greedy))
                    texts = requests[i][0]
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[i])
                bar.update(len(batch))
        return answers

    def _write(self, contexts: list[list[int]], writing: Generation) -> list[str]:
        """Continue one batch."""
        contexts = [self._cut(tokens, writing.max_gen_toks) for tokens in contexts]
        session = continuations.read(
            self.model.runtime,
            contexts,
            decode_last=self.flags.decode_last,
            room=writing.max_gen_toks,
        )
        self._saw(continuations.cache_size(session))
        pieces = write_text(
            session,
            self.model.tokenization,
            max_new_tokens=writing.max_gen_toks,
            stop=writing.until,
            seed=self._seed % 2**32,
            sampling=writing.sampling,
            continues=False,
        )
        self._seed += 1  # a task may ask several times for the same text
        return ["".join(row) for row in zip(*pieces, strict=True)]

    def _cut(self, context: list[int], room: int) -> list[int]:
        """Shorten a context so that it leaves room in the model's range.

        Raises:
          InputError: nothing would be left of it.
        """
        most = self.max_length - room
        if most < 1:
            raise InputError(
                f"{room:,} tokens after a context leave no room for it: max_length, or the model's "
                f"range, is {self.max_length:,}"
            )
        if len(context) <= most:
            return context
        return truncate_tokens(context, most, side=self.flags.truncate)

    def _saw(self, cache: CacheSize) -> None:
        largest = self.largest_cache
        if largest is None or cache.row_bytes > largest.row_bytes:
            self.largest_cache = cache


# Not as a decorator, which would hide the class from type checkers.
register_model("duo_jax")(DuoLM)


def _number(name: str, value: Any, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise InputError(f"{name} is {value!r}, not a number") from None


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[first : first + size] for first in range(0, len(order), size))


def _bar(name: str, total: int, off: bool) -> tqdm:
    return tqdm(desc=name, total=total, disable=off or None)
