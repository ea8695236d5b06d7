"""Answers that are given do not disturb a session that goes on."""

import numpy as np
import pytest

from duo_jax.checkpoints import pretrained
from duo_jax.evaluate.results.forced import force
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model.hf_config import parse_config
from duo_jax.session.runtime import Runtime
from duo_jax.session.session import Session
from tests import models


@pytest.mark.slow
def test_a_session_goes_on_from_its_text_without_reading_it_again(tmp_path):
    raw = models.llama(num_hidden_layers=1)
    architecture = parse_config(raw)
    params = pretrained.load_params(models.write_hf(tmp_path, raw))
    heads = np.arange(architecture.num_kv_heads)[None, :] % 2 == 0
    runtime = Runtime(
        config=duo_config(architecture, heads, sink_size=2, recent_size=3),
        params=split_params(architecture, params, heads),
    )
    text, tail = models.tokens(raw, length=20)
    expected, session = Session(runtime, max_len=40), Session(runtime, max_len=40)
    for one in (expected, session):
        one.append([text.tolist()])
    forced, _ = force(session, [tail[:9]], room=12, go_on=True)
    assert forced.rest.shape[1] == 11
    assert session.tokens == [text.tolist()]
    written, wanted = (list(one.decode(max_new_tokens=6)) for one in (session, expected))
    assert written == wanted
    assert session.timing.prefill_tokens == text.size
