"""Write the tokens that transformers makes of a page, with the tokenizers of small GGUF files.

Needs torch, without which transformers does not read GGUF. Run from the repository root when the
page or a tokenizer of tests.gguf_files changes:

    python -m tests.golden.gguf_tokens

Where torch is installed the tests compare with transformers itself, too.
"""

import json
import pathlib
import tempfile

from tests import gguf_files

FILE = pathlib.Path(__file__).with_name("gguf_tokens.json")
PAGE = '''# A page of everything: prose, code, numbers, emoji and CJK.

The world isn't flat, and we'll print it.  Two  spaces,   three; tabs\tand\r\nline ends.

def hello_world(self, key=12, other=0.125):
    """Return the 3 tokens of a text."""
    for token in [1, 22, 333, 4444]:
        if token != key and not self.ended:
            print("Hello, world!", token * 1_000_000)  # IT'S done, DON'T ask
    return {"camelCase": True, "HTTPServer": None, "snake_case": -1e-5}


🎉 party 👩‍👩‍👧 family 🇩🇪 flag ❤️ heart, café naïve Ångström ﬁ ½ Ⅷ ²
日本語の漢字かな交じり文。「引用」です。カタカナ、１２３。
中文没有空格，标点也不同！한국어 문장은 안녕하세요? Привет, мир. שלום مرحبا नमस्ते ไทย
<think>a thought</think> 1,234,567.89 $5 #tag @name a/b\\c ...!!! \u200b \u00a0 \u3000 end
'''
TOKENIZERS = {
    pre: gguf_files.byte_level(pre, add_bos_token=bos)
    for pre, bos in {
        "gpt-2": False,
        "smollm": False,
        "qwen2": False,
        "llama-bpe": True,
        "tekken": True,
        "gpt-4o": False,
        "dbrx": True,
    }.items()
} | {
    "sentencepiece": gguf_files.sentencepiece(add_bos_token=True, add_space_prefix=True),
    "sentencepiece, EOS": gguf_files.sentencepiece(add_bos_token=True, add_eos_token=True),
    "sentencepiece, nothing added": gguf_files.sentencepiece(add_bos_token=False),
}


def of_transformers(file: pathlib.Path) -> list[int]:
    """Return the tokens of the page by transformers' own reading of a file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(PAGE)["input_ids"]


def write(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Write a model with a tokenizer."""
    tokenizer = TOKENIZERS[name]
    raw = gguf_files.models.llama(num_hidden_layers=1)
    raw["vocab_size"] = gguf_files.num_tokens(tokenizer, folder / "scratch")
    gguf_files.write(folder / "model.gguf", raw, tokenizer=tokenizer)
    return folder / "model.gguf"


def main() -> None:
    """Write the file."""
    tokens = {}
    for name in TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            tokens[name] = of_transformers(write(pathlib.Path(folder), name))
    lines = (f"  {json.dumps(name)}: {json.dumps(ids)}" for name, ids in tokens.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
