"""Why a text has ended."""

from transformers import PreTrainedTokenizerFast

from duo_jax.engine import Request
from duo_jax.engine.text import new_text
from tests import sentencepiece_style


def test_a_stop_string_that_the_last_token_completes_is_the_reason(tmp_path):
    """The bytes of a character are shown once it is whole, or the text is at its end."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sentencepiece_style.write(tmp_path))
    tokens = tokenizer("a 🙂", add_special_tokens=False)["input_ids"][-4:]
    updates = []
    text = new_text(
        0, Request(prompt=(5,), max_tokens=4, stop=("🙂",)), updates.append, tokenizer, ()
    )
    for token in tokens:
        text.write(token, None)
    assert "".join(update.text for update in updates) == ""
    assert [update.finish_reason for update in updates] == [None, None, None, "stop"]
