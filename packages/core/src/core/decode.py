"""The device half of the engine: prefill and the decode loop, compiled for static shapes.

It sees arrays only. A row's numbers depend on its own column of `Inputs` and on the shapes, never on other rows.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.kv_cache import KVCache
from core.models import Model, Params
from core.sampling import Sampler, Settings

PREFILL_TOKENS = 1024  # prefill takes as many rows at once as fit in this many tokens


@dataclasses.dataclass(frozen=True)
class Statics:
    """What the compiled functions of an engine are specialised to."""

    model: Model
    sampler: Sampler
    dtype: jnp.dtype
    stop_ids: tuple[int, ...]
    vocab_size: int
    missing_ids: tuple[int, ...]


class Shape(NamedTuple):
    """What a compiled generation is for: prefill bucket, cache length, log-probabilities of how many alternatives."""

    prefill: int
    cache: int
    logprobs: int | None


class Inputs(NamedTuple):
    """What the rows bring, an array a column."""

    prompt_BT: jax.Array
    length_B: jax.Array
    limit_B: jax.Array
    ignore_eos_B: jax.Array
    key_words_B4: jax.Array
    settings: Settings


class Scores(NamedTuple):
    """Log-probabilities of the tokens produced, and of the likeliest K at their places."""

    chosen_BM: jax.Array
    top_ids_BMK: jax.Array
    top_values_BMK: jax.Array


class State(NamedTuple):
    """A decode in progress. `token_B` has been produced and not yet been fed; it goes to `position_B`."""

    cache: KVCache
    token_B: jax.Array
    position_B: jax.Array
    seen_BV: jax.Array
    done_B: jax.Array
    produced_B: jax.Array
    out_BM: jax.Array
    scores: Scores | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def start(
    statics: Statics, shape: Shape, params: Params, inputs: Inputs, steps: jax.Array | int
) -> State:
    """Prefill and up to `steps` tokens a row."""
    logits_BV, cache = _prefill(statics, shape, params, inputs)
    B, V = logits_BV.shape
    T, M = shape.prefill, shape.cache
    is_prompt_BT = jnp.arange(T)[None] < inputs.length_B[:, None]
    seen_BV = jnp.zeros((B, V), bool)
    seen_BV = jax.vmap(lambda seen_V, ids_T: seen_V.at[ids_T].set(True, mode="drop"))(
        seen_BV, jnp.where(is_prompt_BT, inputs.prompt_BT, V)
    )
    scores = None
    if shape.logprobs is not None:
        top = (B, M, shape.logprobs)
        scores = Scores(jnp.zeros((B, M)), jnp.zeros(top, jnp.int32), jnp.zeros(top))
    state = State(
        cache=cache,
        token_B=jnp.zeros(B, jnp.int32),
        position_B=inputs.length_B - 1,
        seen_BV=seen_BV,
        done_B=inputs.limit_B == 0,
        produced_B=jnp.zeros(B, jnp.int32),
        out_BM=jnp.zeros((B, M), jnp.int32),
        scores=scores,
    )
    state = _take(statics, inputs, logits_BV, state)
    return _decode(statics, params, inputs, state, steps - 1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def go_on(
    statics: Statics,
    params: Params,
    inputs: Inputs,
    state: State,
    steps: jax.Array | int,
) -> State:
    """Up to `steps` more tokens a row; `state` is used up."""
    return _decode(statics, params, inputs, state, steps)


def _prefill(
    statics: Statics, shape: Shape, params: Params, inputs: Inputs
) -> tuple[jax.Array, KVCache]:
    """Returns the logits_BV after each prompt, and a cache of the full length with the prompts in it.

    Rows go through in chunks of a size that the bucket alone decides, and a long row in chunks of its tokens: what a
    chunk takes beside the cache does not grow with the prompt.
    """
    B, T = inputs.prompt_BT.shape
    if T > PREFILL_TOKENS:
        return _prefill_long(statics, shape, params, inputs)
    rows = next(r for r in range(max(1, min(B, PREFILL_TOKENS // T)), 0, -1) if B % r == 0)
    config = statics.model.config

    def chunk(arguments: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, KVCache]:
        prompt_BT, length_B = arguments
        positions_BT = jnp.broadcast_to(jnp.arange(T)[None], prompt_BT.shape)
        empty = KVCache.zeros(config, rows, T, statics.dtype)
        logits_B1V, cache = statics.model.extend(
            params,
            prompt_BT,
            positions_BT,
            empty,
            lengths_B=length_B,
            only_last=True,
            dtype=statics.dtype,
        )
        return logits_B1V[:, 0], cache

    chunks = inputs.prompt_BT.reshape(-1, rows, T), inputs.length_B.reshape(-1, rows)
    logits_CBV, caches = jax.lax.map(chunk, chunks)
    caches = jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), caches)
    return logits_CBV.reshape(B, -1), _with_slots(statics, shape, caches)


def _prefill_long(
    statics: Statics, shape: Shape, params: Params, inputs: Inputs
) -> tuple[jax.Array, KVCache]:
    """`_prefill` of prompts of more than one chunk: row by row, chunk after chunk, no further than the row's end."""
    T = inputs.prompt_BT.shape[1]
    config, size = statics.model.config, PREFILL_TOKENS
    whole = -(-T // size) * size

    def one_row(arguments: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, KVCache]:
        prompt_1T, length_1 = arguments

        def chunk(i: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            tokens_1t = jax.lax.dynamic_slice_in_dim(prompt_1T, i * size, size, axis=1)
            logits_11V, cache = statics.model.extend(
                params,
                tokens_1t,
                i * size + jnp.arange(size)[None],
                carry[1],
                lengths_B=jnp.minimum(length_1 - i * size, size),
                only_last=True,
                dtype=statics.dtype,
            )
            return logits_11V[:, 0], cache

        empty = KVCache.zeros(config, 1, max(shape.cache, whole), statics.dtype)
        carry = jnp.zeros((1, config.vocab_size)), empty
        return jax.lax.fori_loop(0, (length_1[0] + size - 1) // size, chunk, carry)

    prompts_B1T = jnp.pad(inputs.prompt_BT, ((0, 0), (0, whole - T)))[:, None]
    rows = prompts_B1T, inputs.length_B[:, None]
    logits_B1V, caches = jax.lax.map(one_row, rows)
    caches = jax.tree.map(lambda x: x[:, 0], caches)
    return logits_B1V[:, 0], _with_slots(statics, shape, caches)


def _with_slots(statics: Statics, shape: Shape, cache: KVCache) -> KVCache:
    """Returns the prompts' cache with the slots of the whole generation's, whose slots it fills from the first on."""

    def fit(x: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
        S = whole.shape[2]
        return jnp.pad(x[:, :, :S], ((0, 0), (0, 0), (0, max(0, S - x.shape[2])), (0, 0)))

    B = len(cache.k_BKSH[0])
    config, dtype = statics.model.config, statics.dtype
    return jax.tree.map(
        fit, cache, jax.eval_shape(lambda: KVCache.zeros(config, B, shape.cache, dtype))
    )


def _decode(
    statics: Statics, params: Params, inputs: Inputs, state: State, steps: jax.Array | int
) -> State:
    """Feeds the last tokens and draws the next ones, `steps` times or until every row is done."""

    def goes_on(carry: tuple[jax.Array, State]) -> jax.Array:
        step, state = carry
        return (step < steps) & ~state.done_B.all()

    def step_on(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        step, state = carry
        logits_B1V, cache = statics.model.extend(
            params,
            state.token_B[:, None],
            state.position_B[:, None],
            state.cache,
            dtype=statics.dtype,
        )
        return step + 1, _take(statics, inputs, logits_B1V[:, 0], state._replace(cache=cache))

    return jax.lax.while_loop(goes_on, step_on, (jnp.int32(0), state))[1]


def _take(statics: Statics, inputs: Inputs, logits_BV: jax.Array, state: State) -> State:
    """Draws each row's next token from `logits_BV` and books it; rows that are done stay as they are."""
    B, V = logits_BV.shape
    position_B = state.position_B + 1
    keys_B = jax.vmap(_token_key)(inputs.key_words_B4, position_B)
    readable_V = jnp.arange(V) < statics.vocab_size
    if statics.missing_ids:
        readable_V = readable_V.at[jnp.array(statics.missing_ids)].set(False, mode="drop")
    drawn_B = statics.sampler(
        jnp.where(readable_V[None], logits_BV, -jnp.inf), keys_B, inputs.settings, state.seen_BV
    )
    active_B = ~state.done_B
    rows_B = jnp.arange(B)
    slot_B = jnp.where(active_B, state.produced_B, state.out_BM.shape[1])  # beyond the end: dropped

    def book(column: jax.Array, values: jax.Array) -> jax.Array:
        return column.at[rows_B, slot_B].set(values, mode="drop")

    scores = state.scores
    if scores is not None:
        logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        chosen_B = jnp.take_along_axis(logprobs_BV, drawn_B[:, None], axis=-1)[:, 0]
        top_BK, ids_BK = jax.lax.top_k(logprobs_BV, scores.top_ids_BMK.shape[2])
        scores = Scores(*map(book, scores, (chosen_B, ids_BK, top_BK)))
    produced_B = state.produced_B + active_B.astype(jnp.int32)
    is_stop_B = jnp.isin(drawn_B, jnp.array(statics.stop_ids, jnp.int32)) & ~inputs.ignore_eos_B
    return state._replace(
        token_B=jnp.where(active_B, drawn_B, state.token_B),
        position_B=jnp.where(active_B, position_B, state.position_B),
        seen_BV=state.seen_BV.at[rows_B, drawn_B].max(active_B),
        done_B=state.done_B | is_stop_B | (produced_B >= inputs.limit_B),
        produced_B=produced_B,
        out_BM=book(state.out_BM, drawn_B),
        scores=scores,
    )


def _token_key(words_4: jax.Array, position: jax.Array) -> jax.Array:
    key = jax.random.key(0)
    for word in (*words_4, position):
        key = jax.random.fold_in(key, word)
    return key


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    statics: Statics, top: int, params: Params, tokens_1T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the log-probability of each token but the first, and the `top` likeliest ids and values there."""
    logits_1TV = statics.model.apply(params, tokens_1T, dtype=statics.dtype)
    logprobs_TV = jax.nn.log_softmax(logits_1TV[0, :-1], axis=-1)
    chosen_T = jnp.take_along_axis(logprobs_TV, tokens_1T[0, 1:, None], axis=-1)[:, 0]
    values_TK, ids_TK = jax.lax.top_k(logprobs_TV, top)
    return chosen_T, ids_TK, values_TK
