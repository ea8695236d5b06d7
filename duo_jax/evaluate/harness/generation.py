"""The generation arguments of lm-evaluation-harness tasks that we support."""

import dataclasses
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from duo_jax.errors import InputError
from duo_jax.schema.check import argument
from duo_jax.schema.kinds import Count
from duo_jax.serve.sampling import SamplingConfig

_MAX_GEN_TOKS = 256  # the default of lm-eval's own models
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How a task wants texts to be generated."""

    until: list[str]  # a text ends just before the first of these
    max_gen_toks: int
    sampling: SamplingConfig


def read_arguments(gen_kwargs: dict[str, Any]) -> Generation:
    """Read the arguments of a task, or of --gen-kwargs.

    Raises:
      InputError: an argument is not supported.
    """
    try:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, _MAX_GEN_TOKS))
    except (TypeError, ValueError) as error:
        raise InputError(f"generation arguments: {error}") from None
    until, most = kwargs.pop("until"), argument("max_gen_toks", kwargs.pop("max_gen_toks"), Count)
    if not kwargs.pop("do_sample"):
        kwargs["temperature"] = 0.0
    elif "temperature" not in gen_kwargs:
        kwargs["temperature"] = 1.0  # plain sampling
    if kwargs.get("num_beams") == 1:
        del kwargs["num_beams"]
    unknown = sorted(kwargs.keys() - set(_SAMPLING))
    if unknown:
        raise InputError(
            f"generation arguments {', '.join(unknown)} are not supported; these are: until, "
            f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
        )
    return Generation(
        until=[stop for stop in until if stop],
        max_gen_toks=most,
        sampling=SamplingConfig(**kwargs),
    )
