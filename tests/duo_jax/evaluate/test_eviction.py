"""Token eviction: the pool against masked attention, and every method's defining property."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.checkpoints import pretrained
from duo_jax.evaluate import eviction
from duo_jax.evaluate.eviction.cache import Held, Prompt, compress
from duo_jax.evaluate.eviction.decode import decode
from duo_jax.evaluate.eviction.fastgen import FREQUENT, FULL, LOCAL, PUNCTUATION, SPECIAL
from duo_jax.evaluate.eviction.policy import Budget, Selection, Step, highest
from duo_jax.evaluate.eviction.prompt import read, received
from duo_jax.evaluate.results.forced import pad, score
from duo_jax.heads.reconstruction import Instruction, key_scores
from duo_jax.heads.split import duo_config, split_params
from duo_jax.model import llama
from duo_jax.model.hf_config import parse_config
from duo_jax.session.runtime import Runtime
from tests import models

INSTRUCTION = Instruction(whole=(5, 6, 7), part=(8, 9), begin=(10,))
TEXTS, TAILS = (37, 23, 30), (9, 12, 4)
LENGTH, ROOM = max(TEXTS), max(TAILS)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """Return a random model of grouped queries: config and stacked parameters."""
    raw = models.llama(num_hidden_layers=2)  # policies may tell layers apart
    folder = models.write_hf(tmp_path_factory.mktemp("model"), raw)
    return parse_config(raw), pretrained.load_params(folder)


@pytest.fixture(scope="module")
def runtime(stacked):
    config, params = stacked
    heads = np.ones((config.num_layers, config.num_kv_heads), bool)
    return Runtime(
        config=duo_config(config, heads, sink_size=4, recent_size=8),
        params=split_params(config, params, heads),
    )


@pytest.fixture(scope="module")
def rows():
    tokens = models.tokens(models.llama(), batch=3, length=LENGTH + ROOM)
    texts = [row[:size] for row, size in zip(tokens, TEXTS, strict=True)]
    return texts, [row[-size:] for row, size in zip(tokens, TAILS, strict=True)]


def policies():
    return [
        eviction.H2O(),
        eviction.TOVA(),
        eviction.SnapKV(window=4),
        eviction.HeadKV(window=4, importance=((0.9, 0.1), (0.0, 0.4))),
        eviction.FastGen(special=(0,), punctuation=(3, 4)),
        eviction.KVzip(instruction=INSTRUCTION),
    ]


def predict(runtime, policy, rows, slots):
    """Return the most likely token at each place of the tails, and the bytes."""
    found = eviction.predict(runtime, policy, *rows, slots=slots, length=LENGTH, room=ROOM)
    return SimpleNamespace(
        tokens=score(runtime, found.forced, rows[1]).predicted,
        cache_bytes=found.cache_bytes,
        text_bytes=found.text_bytes,
    )


def expected(stacked, rows, kept=None, recent=None):
    """Predict by one forward.

    Args:
      stacked: the model.
      rows: texts and tails.
      kept: what the tail sees of the text; default: all.
      recent: how many tokens before it a query of the tail sees, per head; default: all.
    """
    config, params = stacked
    place = np.arange(LENGTH + ROOM)  # what follows a row's end changes nothing before it
    found = []
    for index, (text, tail) in enumerate(zip(*rows, strict=True)):
        tokens = np.zeros(place.size, np.int32)
        tokens[: text.size + tail.size] = np.concatenate([text, tail])
        seen = np.broadcast_to(
            place[None] <= place[:, None],
            (config.num_layers, config.num_kv_heads, place.size, place.size),
        ).copy()
        if kept is not None:
            seen[:, :, text.size :, : text.size] &= kept[index][:, :, None, : text.size]
        if recent is not None:
            first = place[:, None] - np.array(recent)[:, None, None]
            seen[:, :, text.size :] &= (place[None] >= first)[:, text.size :]
        most_likely = np.asarray(most_likely_behind_mask(config, params, tokens[None], seen))
        found.append(most_likely[text.size - 1 : text.size + tail.size - 1])
    return found


@functools.partial(jax.jit, static_argnames="config")
def most_likely_behind_mask(config, params, tokens, seen):
    """Return the most likely token after each, where heads see what a mask lets them see."""

    def attend(q, k, v, seen):
        grouped = q.reshape(q.shape[0], q.shape[1], k.shape[2], -1, k.shape[3])
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k) * k.shape[3] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen[None, :, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape), None

    x, _ = llama.hidden_states(config, params, tokens, attend=attend, layer_inputs=seen)
    return jnp.argmax(llama.logits(config, params, x)[0], axis=-1)


def select(policy, prompt: Prompt, budget: Budget) -> Selection:
    return jax.jit(policy.select, static_argnums=1)(prompt, budget)


def keep(policy, step: Step, state=None):
    return jax.jit(policy.keep)(step, state)


@pytest.fixture(scope="module")
def from_all(stacked, rows):
    """Return predictions that see the whole text."""
    return expected(stacked, rows)


def assert_same(predicted, likeliest):
    for row, known in zip(predicted, likeliest, strict=True):
        np.testing.assert_array_equal(row[: known.size], known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """Keeps a random part of the text, another for every row and head, and all that comes."""

    name: ClassVar[str] = "chosen"
    keeps_written: ClassVar[bool] = True
    window: int | None = 1

    @staticmethod
    def mask(shape) -> np.ndarray:
        share = np.random.default_rng(0).random((*shape[:3], 1))
        return np.random.default_rng(1).random(shape) < share

    def select(self, prompt: Prompt, budget: Budget) -> Selection:
        kept = jnp.asarray(self.mask(prompt.received.shape)) & prompt.exists
        sizes = jnp.sum(kept, axis=-1, dtype=jnp.int32) + budget.room
        return Selection(kept=kept, sizes=sizes)

    def longest(self, prompt: Prompt, budget: Budget) -> int:
        return prompt.tokens.shape[1] + budget.room

    def keep(self, step: Step, state: Any):
        del state
        return step.held.exists


def test_decoding_from_a_pool_equals_attention_without_what_was_evicted(
    stacked, runtime, rows, from_all
):
    shape = (3, 2, 2, LENGTH)
    slots = 4 * (LENGTH + ROOM)
    found = predict(runtime, Chosen(), rows, slots)
    with_mask = expected(stacked, rows, Chosen.mask(shape))
    assert_same(found.tokens, with_mask)
    assert any((a != b).any() for a, b in zip(with_mask, from_all, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recent:
    """Keeps the latest tokens, in each head as many as it may."""

    name: ClassVar[str] = "recent"
    keeps_written: ClassVar[bool] = False
    window: int | None = 1
    sizes: tuple[int, int] = (6, 9)

    def select(self, prompt: Prompt, budget: Budget) -> Selection:
        del budget
        sizes = jnp.broadcast_to(jnp.array(self.sizes), prompt.keys.shape[:3])
        positions = jnp.arange(prompt.tokens.shape[1], dtype=jnp.int32)[None, None, None]
        kept = positions >= prompt.lengths[:, None, None, None] - sizes[..., None]
        return Selection(kept=kept & prompt.exists, sizes=sizes)

    def longest(self, prompt: Prompt, budget: Budget) -> int:
        del prompt, budget
        return max(self.sizes)

    def keep(self, step: Step, state: Any):
        del state
        return step.held.positions > step.now[:, None, None] - step.sizes[..., None]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(6, 9), (1, 1), (9, 3)])
def test_evicting_at_every_step_equals_attention_to_what_was_still_there(
    stacked, runtime, rows, sizes
):
    found = predict(runtime, Recent(sizes=sizes), rows, 2 * sum(sizes))
    assert_same(found.tokens, expected(stacked, rows, recent=sizes))
    assert found.cache_bytes == 2 * sum(sizes) * runtime.config.architecture.head_dim * 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize("policy", policies(), ids=lambda policy: policy.name)
def test_with_room_for_everything_nothing_changes(runtime, rows, from_all, policy):
    slots = 4 * (LENGTH + ROOM)
    found = predict(runtime, policy, rows, slots)
    assert_same(found.tokens, from_all)
    head_dim = runtime.config.architecture.head_dim
    assert found.cache_bytes == slots * head_dim * 2 * 4
    assert found.text_bytes == pytest.approx(4 * np.mean(TEXTS) * head_dim * 2 * 4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", policies(), ids=lambda policy: policy.name)
def test_a_small_pool_is_small_and_rows_do_not_see_each_other(runtime, rows, policy):
    slots = 4 * (ROOM + 12)
    found = predict(runtime, policy, rows, slots)
    assert found.cache_bytes <= slots * runtime.config.architecture.head_dim * 2 * 4
    assert found.text_bytes <= found.cache_bytes
    three_times = predict(runtime, policy, tuple(3 * [part[1]] for part in rows), slots)
    np.testing.assert_array_equal(three_times.tokens, np.stack(3 * [found.tokens[1]]))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("window", [None, 1, 5, 70])
def test_received_attention_is_that_of_whole_matrices(window):
    rng = np.random.default_rng(0)
    lengths, longest = (70, 3, 41), 70
    q = rng.standard_normal((3, longest, 4, 8)).astype(np.float32)
    k = rng.standard_normal((3, longest, 2, 8)).astype(np.float32)
    found = received(jnp.asarray(q), jnp.asarray(k), jnp.array(lengths), window=window)
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        queries = np.arange(first, length)
        for head in range(2):
            total = np.zeros(longest)
            for query_head in (2 * head, 2 * head + 1):
                scores = q[row, queries, query_head] @ k[row, :, head].T / np.sqrt(8)
                scores[np.arange(longest)[None] > queries[:, None]] = -np.inf
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                total += (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0) / 2
            np.testing.assert_allclose(found[row, head], total, atol=2e-5)


def test_highest_takes_exactly_as_many_even_of_equal_scores():
    scores = jnp.array([[1.0, 2.0, 2.0, 2.0, -jnp.inf], [0.0, 0.0, 0.0, 0.0, 0.0]])
    found = highest(scores, jnp.array([2, 0]))
    np.testing.assert_array_equal(found, [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(highest(scores, 9)[0], [1, 1, 1, 1, 0])


def prompt_of(scores, *, tokens=None, length=None) -> Prompt:
    """Return a prompt whose heads have received this attention [layers, kv_heads, length]."""
    scores = jnp.asarray(scores, jnp.float32)[None]
    size = scores.shape[-1]
    return Prompt(
        keys=jnp.zeros((*scores.shape, 2)),
        values=jnp.zeros((*scores.shape, 2)),
        received=scores,
        tokens=jnp.asarray(np.arange(size)[None] if tokens is None else tokens, jnp.int32),
        lengths=jnp.array([length or size], jnp.int32),
        logits=jnp.zeros((1, 3)),
    )


def step_of(positions, received_, attention, *, size, tokens=None) -> Step:
    """Return a step of one row and these heads; the last slot is the new token."""
    positions = jnp.asarray(positions, jnp.int32)[None]
    return Step(
        held=Held(
            positions=positions,
            tokens=positions if tokens is None else jnp.asarray(tokens, jnp.int32)[None],
            received=jnp.asarray(received_, jnp.float32)[None],
        ),
        attention=jnp.asarray(attention, jnp.float32)[None],
        now=positions[:, 0, -1],
        sizes=jnp.full(positions.shape[:2], size, jnp.int32),
    )


def positions_of(mask) -> list[int]:
    return np.flatnonzero(np.asarray(mask)).tolist()


def test_h2o_keeps_half_recent_and_half_heavy_per_head():
    scores = [[[9, 1, 8, 2, 3, 0, 0, 0], [0, 9, 0, 8, 0, 0, 0, 0]]]
    chosen = select(eviction.H2O(), prompt_of(scores), Budget(slots=8, room=3))
    assert positions_of(chosen.kept[0, 0, 0]) == [0, 2, 6, 7]
    assert positions_of(chosen.kept[0, 0, 1]) == [1, 3, 6, 7]


def test_h2o_drops_the_lightest_that_is_not_recent_at_every_step():
    # Recent are the latest two, the new one included: position 7 is old by now.
    step = step_of([[0, 2, 6, 7, 8]], [[5, 4, 0.5, 0.1, 0.0]], np.zeros((1, 5)), size=4)
    found = keep(eviction.H2O(), step)
    assert positions_of(found[0, 0]) == [0, 1, 3, 4]
    step = step_of([[0, 2, 6, 7, -1]], [[5, 4, 0.5, 0.1, 0.0]], np.zeros((1, 5)), size=4)
    assert positions_of(keep(eviction.H2O(), step)[0, 0]) == [0, 1, 2, 3]


@pytest.mark.slow
def test_every_step_adds_its_attention_to_what_tokens_have_received(runtime, rows):
    tokens, lengths = pad(rows[0], LENGTH)
    prompt = read(runtime.config, runtime.params, tokens, lengths, window=None)
    budget = Budget(slots=4 * (LENGTH + 3), room=3)
    policy = eviction.H2O()
    chosen = select(policy, prompt, budget)
    pool = compress(
        prompt,
        chosen.kept,
        chosen.sizes,
        slots=budget.slots,
        longest=policy.longest(prompt, budget),
    )
    # A query gives each head's group 1 in all: of the text, and of every row that is active.
    np.testing.assert_allclose(pool.held.received.sum(axis=-1)[:, 0, 0], TEXTS, rtol=1e-4)
    active, step = jnp.array([True, False, True]), jax.jit(decode, static_argnums=(0, 2))
    for count in (1, 2, 3):
        given = jnp.array([5, 6, 7])
        _, pool = step(runtime.config, runtime.params, policy, pool, None, given, active)
        total = np.array(TEXTS)[:, None, None] + count * np.array([1, 0, 1])[:, None, None]
        found = pool.held.received.sum(axis=-1)
        np.testing.assert_allclose(found, np.broadcast_to(total, found.shape), rtol=1e-4)
    np.testing.assert_array_equal(pool.lengths, [TEXTS[0] + 3, TEXTS[1], TEXTS[2] + 3])


def test_tova_drops_what_the_latest_query_sees_least_whichever_it_is():
    step = step_of(
        [[0, 2, 6, 7, 8]] * 2,
        np.full((2, 5), 7.0),  # accumulated attention plays no part
        [[0.5, 0.3, 0.1, 0.1, 0.0], [0.1, 0.2, 0.3, 0.2, 0.2]],
        size=4,
    )
    found = keep(eviction.TOVA(), step)
    assert [positions_of(head) for head in found[0]] == [[0, 1, 2, 3]] * 2  # the new one goes


def test_tova_heads_of_a_layer_keep_the_same():
    scores = [[[0.6, 0.1, 0.3, 0.0], [0.0, 0.5, 0.1, 0.4]], [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]]]
    chosen = select(eviction.TOVA(), prompt_of(scores), Budget(slots=8, room=3))
    assert [positions_of(head) for head in chosen.kept[0, 0]] == [[0, 1]] * 2
    assert [positions_of(head) for head in chosen.kept[0, 1]] == [[2, 3]] * 2


def test_snapkv_keeps_the_window_and_neighbourhoods_of_what_it_sees():
    scores = np.zeros((1, 1, 20))
    scores[0, 0, 7], scores[0, 0, 12], scores[0, 0, 18] = 1.0, 0.4, 9.0  # 18 is in the window
    policy = eviction.SnapKV(window=4, kernel=3)
    chosen = select(policy, prompt_of(scores), Budget(slots=9 + 2, room=2))
    assert positions_of(chosen.kept[0, 0, 0]) == [6, 7, 8, 11, 12, 16, 17, 18, 19]
    step = step_of([[0, 2, 3]], [[0, 0, 0]], [[0, 0, 1]], size=9)
    assert np.asarray(keep(policy, step)).all()  # decoding only appends


@pytest.mark.parametrize("policy", [eviction.SnapKV(), eviction.HeadKV(importance=((1.0, 1.0),))])
def test_with_less_room_than_the_window_its_latest_tokens_stay(policy):
    chosen = select(policy, prompt_of(np.zeros((1, 2, 100))), Budget(slots=40, room=0))
    assert [positions_of(head) for head in chosen.kept[0, 0]] == [[*range(80, 100)]] * 2


def test_snapkv_votes_are_of_the_text_before_padding():
    scores = np.zeros((1, 1, 12))
    scores[0, 0, 2] = 1.0
    policy = eviction.SnapKV(window=2, kernel=1)
    chosen = select(policy, prompt_of(scores, length=8), Budget(slots=3, room=0))
    assert positions_of(chosen.kept[0, 0, 0]) == [2, 6, 7]


@pytest.mark.parametrize("slots", [40, 61, 100, 160])
def test_headkv_shares_out_the_budget_by_importance(slots):
    policy = eviction.HeadKV(window=4, importance=((3.0, 1.0), (0.0, 1.0)), beta=2.0)
    budgets = policy.budgets(prompt_of(np.zeros((2, 2, 40))), Budget(slots=slots, room=0))
    assert budgets.sum() == slots
    assert budgets.max() <= 40
    assert budgets[0, 0] == budgets.max()
    if slots == 61:  # 45 beyond the windows: half to all alike, half in proportion
        assert budgets[1, 0] == pytest.approx(4 + 45 / 8, abs=1)
        assert budgets[0, 0] == pytest.approx(4 + 45 / 8 + 45 / 2 * 3 / 5, abs=1)


@pytest.mark.slow
def test_headkv_with_an_empty_pool_is_snapkv(runtime, rows):
    equal = eviction.HeadKV(window=4, importance=((1.0, 0.0), (0.0, 0.0)), beta=1e9)
    slots = 4 * (ROOM + 12)
    found = predict(runtime, equal, rows, slots)
    np.testing.assert_array_equal(
        found.tokens, predict(runtime, eviction.SnapKV(window=4), rows, slots).tokens
    )


def test_headkv_selects_in_a_head_as_snapkv():
    scores = np.random.default_rng(0).random((1, 2, 30))
    policy = eviction.HeadKV(window=4, importance=((3.0, 1.0),), beta=1.01)
    chosen = select(policy, prompt_of(scores), Budget(slots=30, room=0))
    for head, size in enumerate(policy.budgets(prompt_of(scores), Budget(slots=30, room=0))[0]):
        alone = select(
            eviction.SnapKV(window=4),
            prompt_of(scores[:, head : head + 1]),
            Budget(slots=int(size), room=0),
        )
        np.testing.assert_array_equal(chosen.kept[0, 0, head], alone.kept[0, 0, 0])


def test_kvzip_keeps_the_highest_scores_of_all_heads_and_exactly_the_budget():
    scores = np.random.default_rng(0).random((2, 2, 12))
    scores[1] *= 0.1  # a layer that hardly looks back
    policy = eviction.KVzip(instruction=INSTRUCTION)
    chosen = select(policy, prompt_of(scores, length=10), Budget(slots=15 + 4 * 3, room=3))
    kept = np.asarray(chosen.kept[0])
    assert kept.sum() == 15
    assert not kept[..., 10:].any()
    assert scores[kept].min() > scores[..., :10][~kept[..., :10]].max()
    assert chosen.sizes.sum() == 15 + 4 * 3
    assert kept[0].sum() == 15  # heads differ; the second layer keeps nothing


def test_kvzip_keeps_what_the_repetition_looks_at(stacked, runtime, rows):
    tokens, lengths = pad(rows[0], LENGTH)
    policy = eviction.KVzip(instruction=INSTRUCTION)
    found = policy.reread(runtime, tokens, lengths)
    known = key_scores(*stacked, np.asarray(tokens), np.array(TEXTS), instruction=INSTRUCTION)
    np.testing.assert_allclose(found, known.swapaxes(0, 1), rtol=1e-5)
    slots = 4 * (ROOM + 11)
    highest_of_all = [sorted(row.ravel())[-44:] for row in np.asarray(found)]
    kept = np.stack(
        [row >= best[0] for row, best in zip(np.asarray(found), highest_of_all, strict=True)]
    )
    assert kept.sum() == 3 * 44
    assert_same(predict(runtime, policy, rows, slots).tokens, expected(stacked, rows, kept))


# A text of 20 tokens: special at 0, punctuation at 5 and 10. Attention of five heads, each of which
# one policy recovers: all on 0; on 0 and 5; on 0, 3 and 4 too; the latest too; everywhere.
_TOKENS = np.full((1, 20), 50)
_TOKENS[0, 0], _TOKENS[0, 5], _TOKENS[0, 10] = 1, 7, 8
_HEADS = np.zeros((1, 5, 20))
_HEADS[0, 0, 0] = 20
_HEADS[0, 1, [0, 5]] = 10
_HEADS[0, 2, [0, 3, 4]] = 5, 7, 8
_HEADS[0, 3, 0] = 0.4
_HEADS[0, 3, 1:6] = 2.0
_HEADS[0, 3, 14:] = 1.6
_HEADS[0, 4] = 1.0
_FASTGEN = eviction.FastGen(special=(1,), punctuation=(7, 8))


def test_fastgen_gives_each_head_the_cheapest_policy_that_recovers_its_attention():
    prompt = prompt_of(_HEADS, tokens=_TOKENS)
    chosen = select(_FASTGEN, prompt, Budget(slots=1 + 3 + 7 + 13 + 20, room=0))
    assert chosen.state[0, 0].tolist() == [SPECIAL, PUNCTUATION, FREQUENT, LOCAL, FULL]
    kept = [positions_of(head) for head in chosen.kept[0, 0]]
    assert kept[0] == [0]
    assert kept[1] == [0, 5, 10]
    assert kept[2] == [0, 1, 2, 3, 4, 5, 10]  # 30% are 6 tokens: 0, 3, 4 and the first of no weight
    assert kept[3] == [0, 1, 2, 3, 4, 5, 10, *range(14, 20)]
    assert kept[4] == list(range(20))
    assert chosen.sizes[0, 0].tolist() == [len(head) for head in kept]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "slots", [0, 40, 100, *(pytest.param(x, marks=pytest.mark.slow) for x in (5, 20, 60))]
)
def test_fastgen_takes_the_highest_threshold_that_fits(slots):
    prompt = prompt_of(_HEADS, tokens=_TOKENS)
    chosen = select(_FASTGEN, prompt, Budget(slots=slots, room=0))
    taken = int(chosen.sizes.sum())
    assert taken <= max(slots, 5)  # five heads of one special token are the least
    more = select(_FASTGEN, prompt, Budget(slots=slots + 40, room=0))
    assert (more.state >= chosen.state).all()
    if slots == 100:
        assert taken > 5


def test_fastgen_goes_on_with_the_policy_of_each_head():
    positions = np.array([[0, 1, 5, 8, 20]] * 5)
    tokens = np.array([[1, 50, 7, 50, 50]] * 5)
    received_ = np.array([[0, 9, 0, 1, 0.5]] * 5)
    policy = dataclasses.replace(_FASTGEN, frequent_ratio=0.05, local_ratio=0.1)
    step = step_of(positions, received_, np.zeros((5, 5)), size=9, tokens=tokens)
    found = keep(policy, step, jnp.arange(5, dtype=jnp.int32)[None])
    assert [positions_of(head) for head in found[0]] == [
        [0],
        [0, 2],
        [0, 1, 2],  # 5% of 21 tokens: the one with the most attention
        [0, 1, 2, 4],  # 10%: the latest two positions
        [0, 1, 2, 3, 4],
    ]
