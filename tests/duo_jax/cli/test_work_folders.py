"""Work folders say what about a run is another's."""

import pytest

from duo_jax.cli import workdir
from duo_jax.errors import InputError

BEGUN = {"sparsity": 0.5, "split": {"recent": 8}, "weights_digest": "abc"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sparsity": 0.75, "weights_digest": "def"}, "(sparsity was 0.5, is 0.75)"),
        ({"split": {"recent": 9}, "weights_digest": "def"}, "(split.recent was 8, is 9)"),
        ({"weights_digest": "def"}, "(weights_digest was 'abc', is 'def')"),
    ],
)
def test_a_digest_is_told_where_nothing_else_is_another(tmp_path, changes, told):
    workdir.claim(tmp_path, BEGUN)
    with pytest.raises(InputError) as error:
        workdir.check(tmp_path, BEGUN | changes)
    assert f"another configuration {told};" in str(error.value)
