import os

import pytest

from duo_jax.checkpoints.chat_template_files import LONGEST_TEMPLATE
from duo_jax.checkpoints.pretrained import load_tokenizer
from duo_jax.errors import InputError
from tests import models

NAMES = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")


@pytest.mark.parametrize("name", NAMES)
def test_a_template_of_many_megabytes_is_not_read(tmp_path, name):
    models.write_tokenizer(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("x" * LONGEST_TEMPLATE)
    assert "x" in str(load_tokenizer(tmp_path).chat_template)
    os.truncate(file, LONGEST_TEMPLATE + 1)
    with pytest.raises(InputError, match=r"jinja has 1,048,577 bytes; a chat template has at most"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_that_never_ends_is_not_read(tmp_path, name):
    models.write_tokenizer(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    os.symlink("/dev/zero", file)
    with pytest.raises(InputError, match="jinja cannot be read: it is a device"):
        load_tokenizer(tmp_path)
