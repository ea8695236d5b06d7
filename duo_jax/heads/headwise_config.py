"""The heads that rtp-llm serves whole: "headwise_config" in a model's config.json.

https://github.com/alibaba/rtp-llm, its attention (rtp_llm/models_py/modules/factory/attention):

    "headwise_config": {"sink_token_num": 4, "swa_token_num": 8192, "0": [1, 0, ...], ...}

A list per layer has a number for every query head: 1 for a retrieval head, 0 for one that sees the
first `sink_token_num` tokens and its window, the `swa_token_num` tokens before a query and its own.
Layers that are not named have retrieval heads only. A KV head is a retrieval head here if any query
head that reads it is. "seqlen_threshold", below which rtp-llm does not split, is not taken over.
"""

import pathlib
from typing import Annotated, Any

import msgspec
import numpy as np

from duo_jax import files
from duo_jax.errors import InputError
from duo_jax.heads.pattern import Pattern
from duo_jax.schema.check import convert
from duo_jax.schema.json_reader import read_json
from duo_jax.schema.kinds import Count, Size

_Few = Annotated[int, msgspec.Meta(ge=1, le=1_000)]


class _Model(msgspec.Struct):
    """What is read of config.json."""

    headwise_config: dict[str, Any]
    num_hidden_layers: _Few
    num_attention_heads: _Few
    num_key_value_heads: _Few | None = None


class _Sizes(msgspec.Struct):
    """Sizes of heads that are not retrieval heads; the defaults are rtp-llm's."""

    sink_token_num: Size = 4
    swa_token_num: Count = 8192


def read_headwise_config(path: pathlib.Path) -> Pattern:
    """Return the pattern that a config.json holds; its gates are 0 and 1.

    Raises:
      InputError: the file lacks it, or it is malformed.
    """
    where = files.shown(path)
    config = convert(read_json(path), _Model, where)
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    if config.num_attention_heads % kv_heads:
        raise InputError(
            f"{where}: {config.num_attention_heads} query heads are no multiple of {kv_heads} KV "
            "heads"
        )
    gates = np.ones((config.num_hidden_layers, kv_heads))
    for name, heads in config.headwise_config.items():
        if not (name.isascii() and name.isdigit()):
            continue
        if str(int(name)) != name or int(name) >= len(gates):
            raise InputError(f"{where}: headwise_config names layer {name} of {len(gates)}")
        given = convert(heads, list[Annotated[int, msgspec.Meta(ge=0, le=1)]], f"{where}: {name}")
        if len(given) != config.num_attention_heads:
            raise InputError(
                f"{where}: layer {name} has {len(given)} heads, the model "
                f"{config.num_attention_heads}"
            )
        gates[int(name)] = np.reshape(given, (kv_heads, -1)).max(axis=1)
    sizes = convert(config.headwise_config, _Sizes, f"{where}: headwise_config")
    return Pattern(
        gates=gates,
        sink_size=sizes.sink_token_num,
        recent_size=sizes.swa_token_num + 1,  # the window does not count the query's own token
        extra={"made_by": "rtp-llm headwise_config"},
    )
