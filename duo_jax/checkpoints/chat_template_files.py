"""Files of chat templates: refused where they are much larger than any template is."""

import pathlib

from duo_jax import files
from duo_jax.errors import InputError

LONGEST_TEMPLATE = 2**20  # bytes of a file, characters of a text; the longest in use have 20,000


def check_chat_templates(folder: pathlib.Path) -> None:
    """Refuse templates that transformers should not even read.

    Raises:
      InputError: one of them is too large, or no file but something that never ends.
    """
    for path in (folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")):
        if not files.present(path):
            continue
        with files.reading(path):
            size = path.stat().st_size
        if size > LONGEST_TEMPLATE:
            raise InputError(
                f"{files.shown(path)} has {size:,} bytes; a chat template has at most "
                f"{LONGEST_TEMPLATE:,}"
            )
