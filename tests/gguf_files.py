"""Small GGUF files, written by the gguf package's own writer, as llama.cpp's converter would."""

import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests import models

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
F32 = gguf.GGMLQuantizationType.F32
Q8_0 = gguf.GGMLQuantizationType.Q8_0

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a Hugging Face tensor."""
    stem, kind = name.rsplit(".", 1)
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[module]}.{kind}"


def permuted(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Order the rows of q or k as llama.cpp's converter does for architecture llama."""
    halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def llama3_factors(raw: dict) -> np.ndarray:
    """Return the factor of each channel pair, as llama.cpp's converter computes it."""
    rope = raw["rope_parameters"]
    half = np.arange(0, raw["head_dim"], 2, dtype=np.float32)
    frequencies = 1.0 / (rope["rope_theta"] ** (half / raw["head_dim"]))
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def write(
    path: pathlib.Path,
    raw: dict,
    *,
    stored: gguf.GGMLQuantizationType = F32,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write a model of `models`, and return its weights as they are in the file, dequantised.

    Args:
      path: the file.
      raw: its config.json.
      stored: the type of matrices whose rows fit it; the rest is float32.
      tokenizer: adds a tokenizer's entries.
      change: adds more entries or tensors.
      tensors: by Hugging Face names; bytes are blocks of the type `stored`, and not returned.
        Default: those of `models`.
    """
    kind = {"mistral": "llama"}.get(raw["model_type"], raw["model_type"])
    writer = gguf.GGUFWriter(path, kind)
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    head_dim = raw.get("head_dim") or width // heads
    rope = raw["rope_parameters"]
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if head_dim != width // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if kind == "llama":
        writer.add_rope_dimension_count(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(raw))
    if tokenizer is not None:
        tokenizer(writer)
    if change is not None:
        change(writer)
    weights, block = {}, gguf.GGML_QUANT_SIZES[stored][0]
    for name, array in (tensors or models.hf_tensors(raw)).items():
        if array.dtype == np.uint8:
            writer.add_tensor(gguf_name(name), array, raw_dtype=stored)
            continue
        rows = {"q_proj": heads, "k_proj": raw["num_key_value_heads"]}.get(name.split(".")[-2])
        moved = permuted(array, rows) if rows and kind == "llama" else array
        type_ = stored if array.ndim == 2 and array.shape[-1] % block == 0 else F32
        data = gguf.quantize(moved, type_)
        writer.add_tensor(gguf_name(name), data, raw_dtype=type_)
        values = gguf.dequantize(data, type_)
        # Back into Hugging Face's order, by looking each row up.
        order = np.argsort(permuted(np.arange(len(array)), rows)) if moved is not array else None
        weights[name] = values if order is None else values[order]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


_WORDS = (
    "the and of def return self import for in print hello world model text token key is on 0 1 2 3 "
    "12 123 'll 't ing ed er 日本 漢字 を の 한국 안녕 é ü 🎉"
)


@functools.cache
def _byte_level_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return tokens and merges: all bytes, and words that are merged from left to right.

    As in a trained vocabulary, a token that is cut into bytes is merged to itself again.
    """
    from tokenizers import models as tokenizer_models
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [word for plain in _WORDS.split() for word in (plain, f" {plain}")]
    words += ["  ", "    ", "\n\n", "\n    ", " (", '("', "):", ".\n", "__"]
    tokens = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in words:
        [(spelled, _)] = alphabet.pre_tokenize_str(word)
        for at in range(1, len(spelled)):
            pair, whole = (spelled[:at], spelled[at]), spelled[: at + 1]
            merged = tokenizer_models.BPE(tokens, merges).tokenize(whole)
            if whole not in tokens:
                if tuple(token.value for token in merged) != pair:
                    break
                merges.append(pair)
                tokens[whole] = len(tokens)
    return dict.fromkeys(tokens, NORMAL), [" ".join(pair) for pair in merges]


def byte_level(pre: str, **flags: bool) -> Callable[[gguf.GGUFWriter], None]:
    """Return what adds byte-level BPE with a pre-tokenizer's name."""
    tokens, merges = _byte_level_vocabulary()
    tokens = tokens | {"<|begin|>": CONTROL, "<|end|>": CONTROL, "<think>": USER_DEFINED}

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
        _add(writer, tokens, bos="<|begin|>", eos="<|end|>", flags=flags)

    return add


def sentencepiece(**flags: bool) -> Callable[[gguf.GGUFWriter], None]:
    """Return what adds SentencePiece's BPE: all bytes, letters, and some words with scores."""
    tokens = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    tokens |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    scores = [0.0] * len(tokens)
    words = [word for plain in _WORDS.split() for word in (plain, f"▁{plain}")]
    pieces = dict.fromkeys(word[:at] for word in words for at in range(2, len(word) + 1))
    letters = dict.fromkeys(c for word in (*words, "abcdefghijklmnopqrstuvwxyz▁") for c in word)
    pieces = dict.fromkeys(["▁▁", *pieces])
    tokens |= dict.fromkeys((*pieces, *letters), NORMAL)
    scores += [-float(i) for i in range(len(tokens) - len(scores))]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_unk_token_id(0)
        _add(writer, tokens, bos="<s>", eos="</s>", flags=flags)

    return add


def _add(
    writer: gguf.GGUFWriter, tokens: dict[str, int], *, bos: str, eos: str, flags: dict[str, bool]
) -> None:
    names: Sequence[str] = list(tokens)
    writer.add_token_list(names)
    writer.add_token_types(list(tokens.values()))
    writer.add_bos_token_id(names.index(bos))
    writer.add_eos_token_id(names.index(eos))
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, value in flags.items():
        getattr(writer, f"add_{name}")(value)


def num_tokens(tokenizer: Callable[[gguf.GGUFWriter], None], path: pathlib.Path) -> int:
    """Return the size of a tokenizer's vocabulary; `path` is a scratch file."""
    writer = gguf.GGUFWriter(path, "llama")
    tokenizer(writer)
    [entries] = writer.kv_data
    return len(entries["tokenizer.ggml.tokens"].value)
