"""The architecture of a model: sizes, rotary embedding, and which parameters it has."""

import dataclasses
import math
from typing import Annotated, Literal

from msgspec import Meta

from duo_jax.errors import InputError, quoted
from duo_jax.schema.check import check_fields
from duo_jax.schema.kinds import Count

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

FAMILIES = {  # model_type: class in transformers
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Ranges around what was ever published, wide enough for what may come. They keep every table of
# the rotary embedding finite in float32, and whatever lists layers or heads short.
NumLayers = Annotated[int, Meta(ge=1, le=4096)]
NumHeads = Annotated[int, Meta(ge=1, le=4096)]
Width = Annotated[int, Meta(ge=1, le=1 << 30)]
Epsilon = Annotated[float, Meta(ge=1e-30, le=1.0)]
Theta = Annotated[float, Meta(gt=1.0, le=1e18)]
Factor = Annotated[float, Meta(ge=0.01, le=1e6)]
FrequencyFactor = Annotated[float, Meta(gt=0.0, le=1e6)]
AttentionFactor = Annotated[float, Meta(gt=0.0, le=1e3)]
MScale = Annotated[float, Meta(ge=0.0, le=1e3)]

OWN_RANGE = ("dynamic", "llama3", "yarn")  # rope types that depend on the range before scaling
_LARGEST_THETA = 1e37  # in float32, after stretching


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: its base and how it is scaled (transformers' rope types)."""

    kind: RopeKind = "default"
    theta: Theta = 10_000.0
    factor: Factor = 1.0  # linear, dynamic, llama3, yarn
    original_max_positions: Count | None = None  # dynamic, llama3, yarn: range before scaling
    low_freq_factor: FrequencyFactor = 1.0  # llama3
    high_freq_factor: FrequencyFactor = 4.0  # llama3
    beta_fast: FrequencyFactor = 32.0  # yarn
    beta_slow: FrequencyFactor = 1.0  # yarn
    attention_factor: AttentionFactor | None = (
        None  # yarn; None: derived from factor and the mscales
    )
    mscale: MScale | None = None  # yarn
    mscale_all_dim: MScale | None = None  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind in OWN_RANGE and self.original_max_positions is None:
            raise InputError(f"rope type {self.kind!r} needs original_max_position_embeddings")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"rope type 'llama3' needs a low_freq_factor ({self.low_freq_factor}) below its "
                f"high_freq_factor ({self.high_freq_factor})"
            )
        if self.kind == "yarn" and self.beta_fast < self.beta_slow:
            raise InputError(
                f"rope type 'yarn' needs a beta_fast ({self.beta_fast}) of at least its beta_slow "
                f"({self.beta_slow})"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-family decoder. Holds architecture only: no dtype, no run modes."""

    family: str
    vocab_size: Width
    embed_size: Width
    mlp_size: Width
    num_layers: NumLayers
    num_q_heads: NumHeads
    num_kv_heads: NumHeads
    head_dim: NumHeads
    norm_eps: Epsilon
    max_positions: Count  # positions the model was made for, rope scaling included
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.family not in FAMILIES:
            raise InputError(
                f"model type {quoted(self.family)} is not supported; supported: "
                f"{', '.join(FAMILIES)}"
            )
        if self.num_q_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_q_heads} query heads cannot be shared by {self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if self.rope.kind == "dynamic":
            self._check_stretch(self.rope)

    @property
    def q_per_kv(self) -> int:
        """Query heads that read one KV head."""
        return self.num_q_heads // self.num_kv_heads

    def _check_stretch(self, rope: RopeConfig) -> None:
        """Refuse "dynamic" scaling that leaves float32 at the end of the range."""
        if self.head_dim < 4:
            raise InputError(
                f"rope type 'dynamic' needs a head_dim of 4 or more, not {self.head_dim}"
            )
        original = rope.original_max_positions or self.max_positions
        stretch = rope.factor * max(self.max_positions / original, 1.0) - (rope.factor - 1)
        exponent = self.head_dim / (self.head_dim - 2)
        if math.log(rope.theta) + exponent * math.log(stretch) > math.log(_LARGEST_THETA):
            raise InputError(
                f"rope type 'dynamic' with theta {rope.theta}, factor {rope.factor} and head_dim "
                f"{self.head_dim} goes beyond float32"
            )
