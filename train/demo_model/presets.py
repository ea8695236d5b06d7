"""Templates of the demo model's texts, and the presets that ship with it."""

from duo_jax.data.passkey_templates import ORDINALS, filled
from duo_jax.data.passkeys import PasskeyConfig

# Templates of documents and questions. The word before a passkey is its name, in the text as in the
# question, so that looking a passkey up is plain induction: find what followed this word before.
TEMPLATES = PasskeyConfig(
    words="vocabulary",
    intro="Remember this.\n",
    needle="\nPasskey {name}{passkey}.\n",
    closing="\nRepeat this.\n",
    question="Passkey {name}",
    separator=".\n",
)

_ANSWERS = {"num_passkeys": 8, "passkey_words": 8}
_TEMPLATES = {
    "words": TEMPLATES.words,
    "intro": TEMPLATES.intro,
    "needle": TEMPLATES.needle,
    "closing": TEMPLATES.closing,
    "question": TEMPLATES.question,
    "separator": TEMPLATES.separator,
}

# Settings of `python -m train.identify` for this model: streaming heads keep few tokens, as the
# texts are short, and the penalty is large, because the steps are few.
PRESET = {
    "method": "optimise",  # the paper's, which README shows
    "sink": 16,
    "recent": 96,
    "num_steps": 150,
    "reg_weight": 0.4,
    "dtype": "float32",
    "length_buckets": 2,
    "eval_samples": 32,
    "data": {
        **_ANSWERS,
        "min_length": 128,
        "max_length": 512,
        "num_lengths": 4,
        **_TEMPLATES,
    },
}

# Settings of `python -m duo_jax.evaluate` for this model, by task.
EVALUATION = {
    "needle": {
        "batch": 10,
        "max_new_tokens": _ANSWERS["passkey_words"],
        "needle": {
            "intro": TEMPLATES.intro,
            "needle": filled(TEMPLATES.needle, ORDINALS[0]).replace("{passkey}", " {answer}"),
            "answer": "{words}",
            "answer_words": _ANSWERS["passkey_words"],
            "words": TEMPLATES.words,
            "question": TEMPLATES.closing + filled(TEMPLATES.question, ORDINALS[0]),
        },
    },
    "passkeys": {"batch": 8, "min_length": 320, "data": _ANSWERS | _TEMPLATES},
    "compare": {"data": _ANSWERS | _TEMPLATES},
    "frontier": {"data": _ANSWERS | _TEMPLATES},
}
