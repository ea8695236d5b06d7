"""Sessions, texts and saved caches on a mesh; test_on_devices runs this on eight devices."""

import dataclasses
import functools
import json

import numpy as np
import pytest

import duo_jax
from benchmarks import command as command_line
from benchmarks import mesh_speed
from duo_jax import generate
from duo_jax.engine import Engine, Request
from duo_jax.errors import InputError
from duo_jax.evaluate.perplexity.reading import read
from duo_jax.server import serving
from duo_jax.server.flags import ServerFlags
from duo_jax.session import row_cache
from tests.duo_jax.server.conftest import serving_of, wait_for
from tests.small_demo import small_demo

PROMPTS = ["Once upon a time", "In the beginning there was a word, and"]
SEEDED = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 5}


@functools.cache
def model(number: int, **options) -> duo_jax.DuoModel:
    return duo_jax.load(small_demo(), devices=number, **options)


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        pytest.param(8, SEEDED, marks=pytest.mark.slow),
        pytest.param(8, {}, marks=pytest.mark.slow),
        pytest.param(2, SEEDED, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
    ],
)
def test_texts_are_those_of_one_device(number, settings):
    options = {"max_new_tokens": 24, **settings}
    assert model(number).generate(PROMPTS, **options) == model(1).generate(PROMPTS, **options)


# Of a fixed size, a cache needs one program to read and one to write.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "max_len", "kv"),
    [((1, 8), 256, "model"), ((1, 8, 2), None, "model"), ((1, 8, 2), None, "int2")],
)
def test_a_saved_text_goes_on_with_any_number_of_devices(tmp_path, numbers, max_len, kv):
    load = functools.partial(model, prefill_chunk=64, kv=kv)
    text = "The third passkey to the vault is charlie lima. " * 9
    texts, before = {}, row_cache._prefill._cache_size()
    for number in numbers:
        conversation = load(number).conversation(max_len=max_len)
        conversation.append(text)
        conversation.save(tmp_path / str(number))
        texts[number] = conversation.generate(" What is it?", max_new_tokens=12)
    files = {
        number: {
            path.name: path.read_bytes()
            for path in (tmp_path / str(number)).iterdir()
            if path.name.startswith("layer")
        }
        for number in texts
    }
    assert {name: len(data) for name, data in files[8].items()} == {
        name: len(data) for name, data in files[1].items()
    }
    assert len(set(texts.values())) == 1
    for saved, loaded in [(8, 1), (1, 8), *[(8, n) for n in numbers[2:]]]:
        conversation = load(loaded).load_conversation(tmp_path / str(saved), max_len=max_len)
        conversation.save(tmp_path / f"{saved}-{loaded}")
        for name, data in files[saved].items():
            assert (tmp_path / f"{saved}-{loaded}" / name).read_bytes() == data
        assert conversation.generate(" What is it?", max_new_tokens=12) == texts[1]
        assert conversation.session.timing.prefill_tokens < 20  # the text itself was not read again
    if max_len is not None:  # one program for each number: caches lie where they did in all of this
        assert row_cache._prefill._cache_size() - before == len(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["model", "int2"])
def test_an_engine_serves_what_one_device_does(tmp_path, kv):
    one, eight = (model(number, kv=kv) for number in (1, 8))
    text = "The third passkey to the vault is charlie lima. " * 9
    asked = [text + " What is it?", "Once upon a time", text + " And the first?"]
    book = one.conversation()
    book.append(text)
    book.save(tmp_path / "book")
    served = Engine(eight, max_requests=2, max_len=600, cache_tokens=4096, prefill_chunk=64)
    assert served.sizes.page_size == 8 * 64
    served.pin(tmp_path / "book")
    found = []
    for number, prompt in enumerate(asked):
        tokens = tuple(eight.tokenization.encode(prompt))
        request = Request(prompt=tokens, max_tokens=10, choice=number)
        found.append([])
        served.submit(request, found[-1].append)
    while served.step():
        served.check()
    texts = ["".join(update.text for update in updates) for updates in found]
    assert texts == one.generate(asked, max_new_tokens=10)
    assert [updates[-1].cached_tokens > 100 for updates in found] == [True, False, True]


@pytest.mark.slow
def test_a_server_answers_what_one_device_does():
    sizes = {"max_requests": 2, "max_len": 600, "cache_tokens": 4096, "prefill_chunk": 64}
    flags = ServerFlags(
        model=str(small_demo()), served_model_name="demo", devices=8, warm_up=False, **sizes
    )
    body = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
    with serving_of(functools.partial(serving._make_engine, flags)) as served:
        wait_for(lambda: served.service.status != "loading", 300)
        assert served.engine.model.runtime.mesh.size == 8
        with served.http() as client:
            answer = client.post("/v1/completions", json=body, timeout=300).json()
    assert answer["choices"][0]["text"] == model(1).generate(PROMPTS[:1], max_new_tokens=12)[0]


@pytest.mark.slow
def test_perplexity_is_that_of_one_device():
    tokens = np.arange(2, 200) % 50 + 2
    nll, _ = read(model(1).runtime, tokens)
    np.testing.assert_allclose(read(model(8).runtime, tokens)[0], nll, atol=1e-4)


@pytest.mark.slow
def test_generate_says_which_devices_it_uses(capsys):
    generate.main(["--devices", "8", "--max-new-tokens", "8"])
    printed = capsys.readouterr()
    assert "twelf implement keyword parameter comparison" in printed.out
    assert "[on 8 x cpu]" in printed.err


@pytest.mark.slow
def test_groups_write_what_one_device_does():
    options = {"max_new_tokens": 24, **SEEDED}
    grouped = model(8, groups=2)
    assert grouped.generate(PROMPTS, **options) == model(1).generate(PROMPTS, **options)
    with pytest.raises(InputError, match="1 rows cannot be shared by 2 groups"):
        grouped.generate(PROMPTS[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 6, "groups": 2}, "6 devices in 2 groups .* possible: 2, 4, 8"),
        ({"groups": 2}, "need a number"),
        ({"devices": 3}, "possible: 1, 2, 4, 8"),
        ({"devices": 0}, "devices 0 is not"),
    ],
)
def test_what_cannot_be_shared_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        duo_jax.load("demo", **options)


@pytest.mark.slow
def test_the_benchmark_for_several_gpus_runs(tmp_path, monkeypatch):
    small = dataclasses.replace(
        mesh_speed.shortened(1).architecture,
        embed_size=64,
        mlp_size=96,
        vocab_size=64,
        num_q_heads=16,
        head_dim=8,
    )
    config = dataclasses.replace(mesh_speed.shortened(1), architecture=small)
    monkeypatch.setattr(mesh_speed, "shortened", lambda _: config)
    words = ["--devices", "1", "8", "16", "--contexts", "16", "--steps", "1", "--dtype", "float32"]
    command = [*words, "--out", str(tmp_path / "speed")]
    command_line.run(mesh_speed.main, mesh_speed.MeshSpeedFlags, args=command)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["devices"] for row in rows] == [1, 8]
    one, eight = (row["bytes"] for row in rows)
    assert one / 8 < eight < one
    assert rows[1]["message_us"] > 0
