"""A SentencePiece-style tokenizer of 444 tokens, in every way that puts a space before a text.

golden/spaces_llama.json is that of ../shared/cases/models: every text that was appended with it
got a space that nobody wrote.
"""

import json
import pathlib
from typing import Any

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_DOUBLE = {"type": "Replace", "pattern": {"Regex": r"\A▁"}, "content": "▁▁"}


def _metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


def _pre_tokenizers(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


SCHEMES = {
    "first": {"pre_tokenizer": _metaspace("first")},
    "always": {"pre_tokenizer": _metaspace("always")},
    "legacy": {"pre_tokenizer": None, "normalizer": _sequence(_PREPEND, _REPLACE)},
    # As transformers 5 converts tokenizer.model.
    "converted": {
        "normalizer": _sequence(_REPLACE, _DOUBLE),
        "pre_tokenizer": _pre_tokenizers(_metaspace("always")),
    },
    # Numbers are divided first; only the first part of a text gets a space.
    "divided": {
        "pre_tokenizer": _pre_tokenizers(
            _pre_tokenizers({"type": "Digits", "individual_digits": True}), _metaspace("first")
        )
    },
    "never": {"pre_tokenizer": _metaspace("never")},
}
# As Llama 2's: the system message goes into the first one of the user, answers are trimmed, and
# every turn begins with <s>.
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VOCAB = 444


def write(folder: pathlib.Path, scheme: str = "first", **settings: Any) -> pathlib.Path:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
      folder: exists.
      scheme: one of SCHEMES.
      **settings: of tokenizer_config.json.
    """
    golden = pathlib.Path(__file__).parent / "golden" / "spaces_llama.json"
    whole = json.loads(golden.read_text(encoding="utf-8")) | SCHEMES[scheme]
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {"eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder
