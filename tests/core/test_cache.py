"""The cache and attention over it: rings, padding, chunks, positions far out, and what they take."""

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import core
import tiny_gpt_oss as tiny
from core import attention
from core.attention import attend
from core.config import PRESETS
from core.config.gpt_oss import SLIDING
from core.engine import Completion, Engine, Request
from core.kv_cache import KVCache
from core.models import Model
from core.sampling import Sampling

ATOL = 2e-4
WINDOW, BUCKET, LENGTH = 5, 8, 64
PUBLISHED = {"rope_theta": 150000.0, "head_dim": 64, "initial_context_length": 4096}


def two_layers(amplify: float, **variant: Any) -> tuple[Model, dict[str, Any]]:
    config = tiny.config(num_hidden_layers=2, **{"layer_types": None, **variant})
    return core.build(config), tiny.params(tiny.weights(config, amplify))


def tokens(model: Model, *shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, model.config.vocab_size, shape)


def test_a_full_context_of_the_20b_takes_its_full_layers_and_rings_of_128():
    config, S = PRESETS["gpt-oss-20b"], 131_072
    cache = jax.eval_shape(lambda: KVCache.zeros(config, 1, S, jnp.bfloat16))
    assert [k.shape[2] for k in cache.k_RKSH] == [128, S] * 12
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert nbytes == 2 * 2 * 8 * 64 * 12 * (128 + S) == 3_224_371_200


def test_a_ring_is_never_longer_than_the_cache():
    config = PRESETS["gpt-oss-20b"]
    cache = jax.eval_shape(lambda: KVCache.zeros(config, 3, 64))
    assert {x.shape for x in jax.tree.leaves(cache)} == {(3, 8, 64, 64)}


class Cached:
    """Two rows of tokens, their uncached logits, and the two compiled ways of feeding them."""

    def __init__(self):
        self.model, self.params = two_layers(20, sliding_window=WINDOW)
        self.tokens_BT = tokens(self.model, 2, LENGTH)
        whole_BTV = jax.jit(self.model.apply)(self.params, jnp.asarray(self.tokens_BT))
        self.whole_BTV = np.asarray(whole_BTV)
        self.extend = jax.jit(self.model.extend)

    def empty(self) -> KVCache:
        return KVCache.zeros(self.model.config, 2, LENGTH + BUCKET)

    def feed(self, cache: KVCache, start_B: np.ndarray, counts_B: np.ndarray) -> KVCache:
        """Feeds each row so many of its tokens, among junk, and compares their logits with the uncached ones."""
        places_BT = start_B[:, None] + np.arange(BUCKET)
        real_BT = np.arange(BUCKET) < counts_B[:, None]
        ids_BT = np.take_along_axis(self.tokens_BT, np.minimum(places_BT, LENGTH - 1), axis=1)
        ids_BT = np.where(real_BT, ids_BT, (ids_BT + 1) % self.model.config.vocab_size)
        arguments = jnp.asarray(ids_BT), jnp.asarray(places_BT), cache
        logits_BTV, cache = self.extend(self.params, *arguments, lengths_B=jnp.asarray(counts_B))
        rows, columns = np.nonzero(real_BT)
        expected = self.whole_BTV[rows, places_BT[rows, columns]]
        np.testing.assert_allclose(np.asarray(logits_BTV)[real_BT], expected, atol=ATOL)
        return cache

    def step(self, cache: KVCache, start_B: np.ndarray) -> KVCache:
        ids_B1 = self.tokens_BT[[0, 1], start_B][:, None]
        arguments = jnp.asarray(ids_B1), jnp.asarray(start_B[:, None]), cache
        logits_B1V, cache = self.extend(self.params, *arguments)
        np.testing.assert_allclose(logits_B1V[:, 0], self.whole_BTV[[0, 1], start_B], atol=ATOL)
        return cache


@pytest.fixture(scope="module")
def cached() -> Cached:
    return Cached()


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12)
def test_chunks_of_any_sizes_give_the_uncached_logits_at_every_position(cached: Cached, data):
    """Each row has chunks of its own, 0 to 8 tokens and their padding, over thirteen windows; some tokens go singly."""
    cache, start_B = cached.empty(), np.zeros(2, int)
    while (start_B < LENGTH).any():
        if (start_B < LENGTH).all() and data.draw(st.booleans(), "single"):
            cache, start_B = cached.step(cache, start_B), start_B + 1
            continue
        count = st.integers(0, BUCKET)
        counts_B = np.minimum([data.draw(count), data.draw(count)], LENGTH - start_B)
        if not counts_B.any():
            counts_B = np.minimum(1, LENGTH - start_B)
        cache, start_B = cached.feed(cache, start_B, counts_B), start_B + counts_B


def test_token_by_token_the_ring_wraps_a_dozen_times(cached: Cached):
    cache = cached.empty()
    assert [k.shape[2] for k in cache.k_RKSH] == [WINDOW, LENGTH + BUCKET]
    for start in range(LENGTH):
        cache = cached.step(cache, np.full(2, start))


def test_padding_leaves_no_trace_in_a_ring(cached: Cached):
    """The same three tokens, alone in their bucket and behind other junk: the same bits."""
    ids = tokens(cached.model, 2, BUCKET)
    places = jnp.broadcast_to(jnp.arange(BUCKET)[None], ids.shape)
    rings = []
    for junk in (3, 4):
        padded = jnp.asarray(ids).at[:, 3:].set(junk)
        _, cache = cached.extend(
            cached.params, padded, places, cached.empty(), lengths_B=jnp.array([3, 3])
        )
        rings.append(np.asarray(cache.k_RKSH[0]))
    np.testing.assert_array_equal(*rings)
    assert rings[0][:, :, :3].any()
    assert not rings[0][:, :, 3:].any()


@pytest.mark.slow
def test_decoding_across_4096_gives_the_uncached_logits():
    """Published angles; a prompt of 4,090 in chunks, then token by token to 4,110."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192}
    model, params = two_layers(10, **PUBLISHED, **sizes)
    T, whole, chunk = 4090, 4110, 1024
    ids = jnp.asarray(tokens(model, 1, whole))
    expected_TV = np.asarray(jax.jit(model.apply)(params, ids))[0]
    extend = jax.jit(model.extend, donate_argnums=3)
    cache = KVCache.zeros(model.config, 1, 4224)
    padded = jnp.pad(ids, ((0, 0), (0, 10)))
    for start in range(0, T, chunk):
        places = start + jnp.arange(chunk)[None]
        lengths_B = jnp.array([min(chunk, T - start)])
        fed = padded[:, start : start + chunk]
        _, cache = extend(params, fed, places, cache, lengths_B=lengths_B)
    for t in range(T, whole):
        logits, cache = extend(params, ids[:, t : t + 1], jnp.array([[t]]), cache)
        # float32 angles of position p are wrong by p * 6e-8.
        np.testing.assert_allclose(logits[0, 0], expected_TV[t], atol=5e-4)


def test_a_hundred_thousand_positions_out_it_is_the_same_mathematics():
    """Rotations are relative: windows alone see the same at 100,000 as at 0, but for the angles' rounding."""
    config = tiny.config(**PUBLISHED, num_hidden_layers=2, layer_types=(SLIDING,) * 2)
    model, flat = core.build(config), tiny.weights(config, 10)
    T, start = 60, 100_000
    ids = tokens(model, 1, T)
    expected_TV = tiny.logits(config, flat, ids)[0]
    extend, cache = jax.jit(model.extend), KVCache.zeros(model.config, 1, 131_072)
    assert {k.shape[2] for k in cache.k_RKSH} == {17}
    params = tiny.params(flat)
    for t in range(T):
        place = jnp.array([[start + t]])
        logits, cache = extend(params, jnp.asarray(ids[:, t : t + 1]), place, cache)
        if t < 2 * 16:  # two layers still look back on the empty ring
            continue
        found = np.asarray(logits[0, 0])
        # A float32 angle of 100,000 radians is off by up to 0.004.
        np.testing.assert_allclose(found, expected_TV[t], atol=2e-2)
        assert found.argmax() == expected_TV[t].argmax()


def qkv(B: int, T: int, S: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = (B, T, 6, 10), (B, 2, S, 10), (B, 2, S, 10)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize("window", [None, pytest.param(7, marks=pytest.mark.slow), 31])
@pytest.mark.parametrize(("T", "S"), [(50, 50), (45, 76)])
def test_blocks_of_queries_give_what_all_at_once_give(monkeypatch, window, T: int, S: int):
    positions_BT = (
        jnp.array([[3], [100]]) + jnp.arange(T)[None]
    )  # the first row's cache is not full
    keys_BS = positions_BT[:, -1:] - S + 1 + jnp.arange(S)[None]
    sinks_N = jnp.linspace(-2, 2, 6)
    run = functools.partial(attend, positions_BT=positions_BT, scale=0.3, window=window)

    def loss(q, k, v):
        return jnp.square(run(q, k, v, keys_BS, sinks_N=sinks_N)).sum()

    expected = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*qkv(2, T, S))
    monkeypatch.setattr(attention, "_SCORES", 6 * 8 * 48)
    in_blocks = jax.jit(jax.value_and_grad(lambda *x: loss(*x), (0, 1, 2)))
    found = in_blocks(*qkv(2, T, S))
    assert "scan[" in str(jax.make_jaxpr(lambda *x: loss(*x))(*qkv(2, T, S)))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, expected
    )


def test_published_gpt2s_attend_in_one_block():
    for heads in (12, 16, 20, 25):
        shapes = [
            jax.ShapeDtypeStruct(s, jnp.float32)
            for s in ((4, 1024, heads, 64), (4, heads, 1024, 64))
        ]
        positions = jnp.broadcast_to(jnp.arange(1024)[None], (4, 1024))
        run = functools.partial(attend, positions_BT=positions, scale=0.1)
        assert "scan[" not in str(jax.make_jaxpr(run)(shapes[0], shapes[1], shapes[1]))


@pytest.mark.parametrize("window", [None, 128])
def test_attention_over_a_long_sequence_takes_bounded_memory(window: int | None):
    """16,384 positions: all scores at once would be 8.6 GB."""
    T = 16_384
    q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, T, 8, 16), (1, 2, T, 16)))
    run = functools.partial(attend, positions_BT=jnp.arange(T)[None], scale=0.1, window=window)
    needed = jax.jit(run).lower(q, k, k).compile().memory_analysis()
    assert needed is not None
    assert needed.temp_size_in_bytes < (1 << 29 if window is None else 1 << 26)


@pytest.mark.slow
def test_long_prompts_go_through_in_chunks_and_continue_as_uncached():
    """A context of 50 is no multiple of the chunk of 16; alone and among others the same."""
    model, params = two_layers(20, sliding_window=WINDOW, max_position_embeddings=50)
    engine, apply = Engine(model, params, slots=3, chunk=16), jax.jit(model.apply)
    greedy = Sampling(temperature=0, max_new_tokens=9, logprobs=2)
    prompts = [tokens(model, n).tolist() for n in (37, 33, 40)]
    requests = [Request(prompt, greedy) for prompt in prompts]
    together = engine.complete(requests)
    assert together[1:2] == engine.complete(requests[1:2])
    for prompt, found in zip(prompts, together, strict=True):
        assert isinstance(found, Completion)
        whole = jnp.asarray([[*prompt, *found.tokens, *range(50)][:50]])
        logits_TV = np.asarray(apply(params, whole))[0, len(prompt) - 1 :]
        assert logits_TV.argmax(-1)[: len(found.tokens)].tolist() == list(found.tokens)


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_decoding_makes_no_copy_of_narrow_weights(slots: int):
    """Head and embedding are 16 MB each in bfloat16; a float32 copy of either would be 32."""
    config = tiny.packed_config(vocab_size=131_072, num_hidden_layers=2, layer_types=None)
    model = core.build(config)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, jnp.uint8 if x.dtype == jnp.uint8 else jnp.bfloat16
        ),
        jax.eval_shape(model.init, jax.random.key(0)),
    )

    def loop(params, ids_B1, cache):
        def step(carry):
            t, ids_B1, cache = carry
            places = jnp.broadcast_to(t[None, None], ids_B1.shape)
            logits, cache = model.extend(params, ids_B1, places, cache, dtype=jnp.bfloat16)
            return t + 1, logits.argmax(-1).astype(jnp.int32), cache

        return jax.lax.while_loop(lambda carry: carry[0] < 9, step, (jnp.int32(0), ids_B1, cache))

    ids_B1 = jax.ShapeDtypeStruct((slots, 1), jnp.int32)
    cache = jax.eval_shape(lambda: KVCache.zeros(config, slots, 64, jnp.bfloat16))
    needed = jax.jit(loop).lower(params, ids_B1, cache).compile().memory_analysis()
    assert needed is not None
    assert needed.temp_size_in_bytes < 8 * 2**20
