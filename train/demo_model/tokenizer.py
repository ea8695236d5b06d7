"""A small byte-level BPE tokenizer, in the files that transformers reads."""

import json
import pathlib
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from duo_jax.data.passkey_templates import ORDINALS, filled
from duo_jax.data.passkeys import PasskeyConfig

BOS, EOS = "<|begin|>", "<|end|>"
# Often enough that every word of the templates becomes one token.
_TEMPLATE_COPIES = 200


def write_tokenizer(
    folder: pathlib.Path,
    documents: Sequence[str],
    templates: PasskeyConfig,
    *,
    vocab_size: int,
    max_length: int,
) -> None:
    """Train a tokenizer on documents and templates, and write it as transformers would.

    Any text round-trips (bytes are the smallest tokens). Id 0, the beginning, is put in front
    of every text; id 1 is the end of a sequence. Deterministic.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[BOS, EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents, *_template_text(templates)], trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
            ),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _template_text(templates: PasskeyConfig) -> Iterator[str]:
    for _ in range(_TEMPLATE_COPIES):
        yield templates.intro
        for name in ORDINALS:
            yield filled(templates.needle, name).replace("{passkey}", "")
            yield filled(templates.question, name) + templates.separator
