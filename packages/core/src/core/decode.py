"""The device half of the engine: prefill and the decode loop, compiled for static shapes.

It sees arrays only. Everything large stays on the device in a `State` of one row a slot, which each call uses up and
returns; what the host knows of the slots comes anew with each dispatch, in small `Columns`. A slot's numbers depend on
its own column and its own row, never on other slots.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core.kv_cache import KVCache
from core.models import Model, Params
from core.sampling import Sampler, Settings

STEPS = 32
"""Tokens a slot and dispatch, at most."""


@dataclasses.dataclass(frozen=True)
class Statics:
    """What the compiled functions of an engine are specialised to."""

    model: Model
    sampler: Sampler
    dtype: jnp.dtype
    stop_ids: tuple[int, ...]
    vocab_size: int
    missing_ids: tuple[int, ...]
    top_logprobs: int


class State(NamedTuple):
    """A row a slot; whether what is in it means anything is the host's to know."""

    cache: KVCache
    logits_BV: jax.Array
    """After a prompt's last token, for the slot's first draw."""
    counts_BV: jax.Array
    """Of each token, twice how often it was produced, and one more if the prompt holds it."""
    bias_BV: jax.Array
    """What is added to the logits."""

    @classmethod
    def zeros(cls, statics: Statics, slots: int, length: int) -> "State":
        """Returns the state of empty slots, for positions below `length`."""
        config, V = statics.model.config, statics.model.config.vocab_size
        return cls(
            cache=KVCache.zeros(config, slots, length, statics.dtype),
            logits_BV=jnp.zeros((slots, V)),
            counts_BV=jnp.zeros((slots, V), jnp.int32),
            bias_BV=jnp.zeros((slots, V)),
        )


class Columns(NamedTuple):
    """What the host says of the slots, an array each."""

    active_B: Any
    fresh_B: Any
    """The prompt is in the cache and nothing has been drawn: the first token comes from `State.logits_BV`."""
    token_B: Any
    """The last token, which has not been fed; nothing for a fresh slot."""
    position_B: Any
    """Where the last token goes; of a fresh slot, where its first one will go."""
    produced_B: Any
    limit_B: Any
    ignore_eos_B: Any
    wants_scores_B: Any
    key_words_B4: Any
    settings: Settings


class Scores(NamedTuple):
    """Log-probabilities of the tokens produced, and of the likeliest K at their places; zeros for who wants none."""

    chosen_BM: jax.Array
    top_ids_BMK: jax.Array
    top_values_BMK: jax.Array


class Produced(NamedTuple):
    """What a dispatch gives: of each row of `tokens_BM` the first `count_B`."""

    tokens_BM: jax.Array
    count_B: jax.Array
    scores: Scores


class _Run(NamedTuple):
    """A dispatch in progress."""

    cache: KVCache
    counts_BV: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    out: Produced
    step: jax.Array


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    statics: Statics,
    params: Params,
    state: State,
    tokens_1T: Any,
    start: Any,
    length: Any,
    slot: Any,
    is_first: Any,
    bias_V: Any,
) -> State:
    """Feeds the next `length` tokens of a prompt, of which `start` are in the slot's cache already.

    The first call for a prompt forgets what was in the slot. The T - length tokens of padding must fit the cache too.
    """
    T, V = tokens_1T.shape[1], statics.model.config.vocab_size
    # Padding may lie beyond the last position, where there is no embedding to look up.
    last = statics.model.config.context_length - 1
    logits_11V, cache = statics.model.extend(
        params,
        tokens_1T,
        jnp.minimum(start + jnp.arange(T), last)[None],
        state.cache._replace(first_row=slot),
        lengths_B=jnp.reshape(length, (1,)),
        only_last=True,
        dtype=statics.dtype,
    )
    ids_T = jnp.where(jnp.arange(T) < length, tokens_1T[0], V)
    return State(
        cache=cache._replace(first_row=None),
        logits_BV=_set_row(state.logits_BV, slot, logits_11V[0, 0]),
        counts_BV=_count_prompt(state.counts_BV, slot, ids_T, is_first),
        bias_BV=_set_row(state.bias_BV, slot, bias_V),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def fork(statics: Statics, state: State, source: Any, target: Any) -> State:
    """Returns the state with one slot's row in another slot too."""
    del statics
    return jax.tree.map(
        lambda x: jax.lax.dynamic_update_slice_in_dim(
            x, jax.lax.dynamic_slice_in_dim(x, source, 1), target, axis=0
        ),
        state,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    statics: Statics, params: Params, state: State, columns: Columns, steps: Any, pause: Any
) -> tuple[State, Produced]:
    """Draws the first tokens of fresh slots, then feeds and draws, `steps` tokens a slot at most.

    Ends early when `pause` slots have come to their end, or all.
    """
    B, K = len(columns.active_B), statics.top_logprobs
    out = Produced(
        tokens_BM=jnp.zeros((B, STEPS), jnp.int32),
        count_B=jnp.zeros(B, jnp.int32),
        scores=Scores(
            jnp.zeros((B, STEPS)), jnp.zeros((B, STEPS, K), jnp.int32), jnp.zeros((B, STEPS, K))
        ),
    )
    is_fresh_B = columns.active_B & columns.fresh_B
    run = _Run(
        cache=state.cache,
        counts_BV=state.counts_BV,
        token_B=jnp.asarray(columns.token_B),
        # One less, because drawing goes on by one.
        position_B=columns.position_B - is_fresh_B.astype(jnp.int32),
        done_B=~columns.active_B,
        out=out,
        step=jnp.where(is_fresh_B.any(), 1, 0),
    )
    take = functools.partial(_take, statics, columns, state.bias_BV)
    run = jax.lax.cond(
        is_fresh_B.any(), lambda run: take(state.logits_BV, is_fresh_B, run), lambda run: run, run
    )

    def goes_on(run: _Run) -> jax.Array:
        ended = (run.done_B & columns.active_B).sum()
        return (run.step < steps) & ~run.done_B.all() & (ended < pause)

    def step_on(run: _Run) -> _Run:
        active_B = ~run.done_B
        logits_B1V, cache = statics.model.extend(
            params,
            jnp.where(active_B, run.token_B, 0)[:, None],
            jnp.where(active_B, run.position_B, 0)[:, None],
            run.cache,
            lengths_B=active_B.astype(jnp.int32),
            dtype=statics.dtype,
        )
        run = run._replace(cache=cache, step=run.step + 1)
        return take(logits_B1V[:, 0], active_B, run)

    run = jax.lax.while_loop(goes_on, step_on, run)
    return state._replace(cache=run.cache, counts_BV=run.counts_BV), run.out


def _take(
    statics: Statics,
    columns: Columns,
    bias_BV: jax.Array,
    logits_BV: jax.Array,
    draws_B: jax.Array,
    run: _Run,
) -> _Run:
    """Draws the next token of the rows that `draws_B` names and books it; the others stay as they are."""
    B, V = logits_BV.shape
    position_B = run.position_B + 1
    drawn_B = statics.sampler(
        jnp.where(_readable(statics, V)[None], logits_BV, -jnp.inf),
        jax.vmap(_token_key)(columns.key_words_B4, position_B),
        columns.settings,
        run.counts_BV,
        bias_BV,
        columns.produced_B + run.out.count_B,
        statics.stop_ids,
    )
    rows_B, place_B = jnp.arange(B), jnp.where(draws_B, run.out.count_B, STEPS)  # dropped beyond
    count_B = run.out.count_B + draws_B.astype(jnp.int32)
    is_stop_B = jnp.isin(drawn_B, jnp.array(statics.stop_ids, jnp.int32)) & ~columns.ignore_eos_B
    is_last_B = columns.produced_B + count_B >= columns.limit_B
    out = Produced(
        tokens_BM=run.out.tokens_BM.at[rows_B, place_B].set(drawn_B, mode="drop"),
        count_B=count_B,
        scores=jax.lax.cond(
            (columns.wants_scores_B & draws_B).any(),
            lambda scores: _score(logits_BV, drawn_B, place_B, scores),
            lambda scores: scores,
            run.out.scores,
        ),
    )
    return run._replace(
        token_B=jnp.where(draws_B, drawn_B, run.token_B),
        position_B=jnp.where(draws_B, position_B, run.position_B),
        counts_BV=run.counts_BV.at[rows_B, drawn_B].add(2 * draws_B.astype(jnp.int32)),
        done_B=run.done_B | (draws_B & (is_stop_B | is_last_B)),
        out=out,
    )


def _score(logits_BV: jax.Array, drawn_B: jax.Array, place_B: jax.Array, scores: Scores) -> Scores:
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logprobs_BV, drawn_B[:, None], axis=-1)[:, 0]
    top_BK, ids_BK = jax.lax.top_k(logprobs_BV, scores.top_ids_BMK.shape[2])
    rows_B = jnp.arange(len(place_B))
    columns = zip(scores, (chosen_B, ids_BK, top_BK), strict=True)
    return Scores(*(x.at[rows_B, place_B].set(new, mode="drop") for x, new in columns))


def _readable(statics: Statics, V: int) -> jax.Array:
    readable_V = jnp.arange(V) < statics.vocab_size
    if statics.missing_ids:
        readable_V = readable_V.at[jnp.array(statics.missing_ids)].set(False, mode="drop")
    return readable_V


def _set_row(x_BV: jax.Array, slot: Any, row_V: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BV, row_V[None].astype(x_BV.dtype), slot, axis=0)


def _count_prompt(counts_BV: jax.Array, slot: Any, ids_T: jax.Array, is_first: Any) -> jax.Array:
    counts_V = jax.lax.dynamic_slice_in_dim(counts_BV, slot, 1)[0]
    counts_V = jnp.where(is_first, 0, counts_V).at[ids_T].max(1, mode="drop")
    return _set_row(counts_BV, slot, counts_V)


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
