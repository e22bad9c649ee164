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
from jax.sharding import Mesh, NamedSharding

from core import sharding
from core.kv_cache import KVCache
from core.layers import unembed
from core.models import Model, Params
from core.sampling import Sampler, Settings

STEPS = 32
"""Steps a dispatch, at most."""

NO_NUMBER = -1
"""In the place of a token: the model's logits there are no numbers, and the row has ended."""

SCORED = 128
"""Positions whose logits are there at once in `score`: of a long text all of them would be more than its cache."""

_NGRAM = 3  # tokens that must have stood together before, for a draft


@dataclasses.dataclass(frozen=True)
class Statics:
    """What the compiled functions of an engine are specialised to."""

    model: Model
    sampler: Sampler
    dtype: jnp.dtype
    """Of the activations."""
    cache_dtype: jnp.dtype
    stop_ids: tuple[int, ...]
    vocab_size: int
    missing_ids: tuple[int, ...]
    top_logprobs: int
    speculation: int
    """Tokens that are drafted from the text so far and fed beside the last one; those that come true are drawn."""


class State(NamedTuple):
    """A row a slot; whether what is in it means anything is the host's to know."""

    cache: KVCache
    logits_BV: jax.Array
    """After a prompt's last token, for the slot's first draw."""
    counts_BV: jax.Array
    """Of each token, twice how often it was produced, and one more if the prompt holds it."""
    bias_BV: jax.Array
    """What is added to the logits."""
    tokens_BL: jax.Array | None
    """What stands at each position, for drafts; None without speculation."""

    @classmethod
    def zeros(cls, statics: Statics, slots: int, length: int) -> "State":
        """Returns the state of empty slots, for positions below `length`."""
        config, V, J = statics.model.config, statics.model.config.vocab_size, statics.speculation
        return cls(
            cache=KVCache.zeros(config, slots, length, statics.cache_dtype, ahead=J),
            logits_BV=jnp.zeros((slots, V)),
            counts_BV=jnp.zeros((slots, V), jnp.int32),
            bias_BV=jnp.zeros((slots, V)),
            tokens_BL=jnp.zeros((slots, length), jnp.int32) if J else None,
        )

    @classmethod
    def empty(cls, statics: Statics, slots: int, length: int, mesh: Mesh | None) -> "State":
        """Returns `zeros`, of several devices each its part."""
        if mesh is None:
            return cls.zeros(statics, slots, length)
        make = functools.partial(cls.zeros, statics, slots, length)

        def place(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> NamedSharding:
            return sharding.rows(mesh, x, heads=path[0].name == "cache")

        places = jax.tree_util.tree_map_with_path(place, jax.eval_shape(make))
        return jax.jit(make, out_shardings=places)()


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
    steps: jax.Array
    """How often the last tokens were fed."""

    @classmethod
    def nothing(cls, statics: Statics, B: int) -> "Produced":
        """Returns what a dispatch begins with, and the room for what it may give."""
        M, K = 1 + STEPS * (1 + statics.speculation), statics.top_logprobs
        return cls(
            tokens_BM=jnp.zeros((B, M), jnp.int32),
            count_B=jnp.zeros(B, jnp.int32),
            scores=Scores(jnp.zeros((B, M)), jnp.zeros((B, M, K), jnp.int32), jnp.zeros((B, M, K))),
            steps=jnp.int32(0),
        )


class _Run(NamedTuple):
    """A dispatch in progress, but for the cache."""

    counts_BV: jax.Array
    tokens_BL: jax.Array | None
    token_B: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    out: Produced


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
    is_last: Any,
    bias_V: Any,
) -> State:
    """Feeds the next `length` tokens of a prompt, of which `start` are in the slot's cache already.

    The first call for a prompt forgets what was in the slot; the last one leaves the logits for the first draw. The
    T - length tokens of padding must fit the cache too.
    """
    T, V = tokens_1T.shape[1], statics.model.config.vocab_size
    # Padding may lie beyond the last position, where there is no embedding to look up.
    last = statics.model.config.context_length - 1
    x_11D, cache = statics.model.extend(
        params,
        tokens_1T,
        jnp.minimum(start + jnp.arange(T), last)[None],
        state.cache._replace(first_row=slot),
        lengths_B=jnp.reshape(length, (1,)),
        only_last=True,
        only_hidden=True,
        dtype=statics.dtype,
    )
    # Of GPT-2's weights the head is a third: nobody asks for the logits after a chunk that is not the last.
    logits_V = jax.lax.cond(
        is_last,
        lambda: unembed(x_11D, statics.model.head(params))[0, 0],
        lambda: jnp.zeros(V),
    )
    ids_T = jnp.where(jnp.arange(T) < length, tokens_1T[0], V)
    return State(
        cache=cache._replace(first_row=None),
        logits_BV=_set_row(state.logits_BV, slot, logits_V),
        counts_BV=_count_prompt(state.counts_BV, slot, ids_T, is_first),
        bias_BV=_set_row(state.bias_BV, slot, bias_V),
        tokens_BL=_note_tokens(state.tokens_BL, slot, start, jnp.asarray(tokens_1T)),
    )


@functools.partial(jax.jit, donate_argnums=0)
def fork(state: State, source: Any, target: Any) -> State:
    """Returns the state with one slot's row in another slot too."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_update_slice_in_dim(
            x, jax.lax.dynamic_slice_in_dim(x, source, 1), target, axis=0
        ),
        state,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_chunk(statics: Statics, size: int, state: State, slot: Any, start: Any) -> KVCache:
    """Returns what the chunk from `start` on, which was the last to be fed, left in the slot's cache."""

    def of_layer(x_RKSH: jax.Array, window: int | None) -> jax.Array:
        _, K, S, H = x_RKSH.shape
        # A ring goes as it lies: what else is in it is from before, and so the same whenever the chunk is.
        place, length = (start, size) if window is None else (0, S)
        return jax.lax.dynamic_slice(x_RKSH, (slot, 0, place, 0), (1, K, length, H))

    windows = statics.model.config.windows
    k_RKSH, v_RKSH = (tuple(map(of_layer, xs, windows)) for xs in state.cache[:2])
    return KVCache(k_RKSH, v_RKSH)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def write_chunk(
    statics: Statics,
    state: State,
    chunk: KVCache,
    tokens_1T: Any,
    start: Any,
    slot: Any,
    is_first: Any,
) -> State:
    """Returns the state as if the chunk's tokens had been fed, from `start` on; more of the prompt must follow."""

    def of_layer(x_RKSH: jax.Array, new_1KTH: jax.Array, window: int | None) -> jax.Array:
        place = (slot, 0, start if window is None else 0, 0)
        return jax.lax.dynamic_update_slice(x_RKSH, new_1KTH, place)

    windows = statics.model.config.windows
    pairs = zip(state.cache[:2], chunk[:2], strict=True)
    k_RKSH, v_RKSH = (tuple(map(of_layer, xs, new, windows)) for xs, new in pairs)
    return state._replace(
        cache=KVCache(k_RKSH, v_RKSH),
        counts_BV=_count_prompt(state.counts_BV, slot, jnp.asarray(tokens_1T)[0], is_first),
        tokens_BL=_note_tokens(state.tokens_BL, slot, start, jnp.asarray(tokens_1T)),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    statics: Statics, params: Params, state: State, columns: Columns, steps: Any, pause: Any
) -> tuple[State, Produced]:
    """Draws the first tokens of fresh slots, then feeds and draws, `steps` times at most.

    Ends early when `pause` slots have come to their end, or all.
    """
    is_fresh_B = columns.active_B & columns.fresh_B
    run = _Run(
        counts_BV=state.counts_BV,
        tokens_BL=state.tokens_BL,
        token_B=jnp.asarray(columns.token_B),
        # One less, because drawing goes on by one.
        position_B=columns.position_B - is_fresh_B.astype(jnp.int32),
        done_B=~columns.active_B,
        out=Produced.nothing(statics, len(columns.active_B)),
    )
    keys_B = jax.vmap(_request_key)(columns.key_words_B4)
    take = functools.partial(_take, statics, columns, keys_B, state.bias_BV)
    run = jax.lax.cond(
        is_fresh_B.any(), lambda run: take(state.logits_BV, is_fresh_B, run), lambda run: run, run
    )

    def goes_on(carry: tuple[KVCache, _Run]) -> jax.Array:
        _, run = carry
        ended = (run.done_B & columns.active_B).sum()
        return (run.out.steps < steps) & ~run.done_B.all() & (ended < pause)

    def step_on(carry: tuple[KVCache, _Run]) -> tuple[KVCache, _Run]:
        cache, run = carry
        draws_B = ~run.done_B
        drafts_BJ, drafted_B = _drafts(statics, columns, run)
        J, last = statics.speculation, statics.model.config.context_length - 1
        tokens_BT = jnp.concatenate([run.token_B[:, None], drafts_BJ], axis=1)
        positions_BT = run.position_B[:, None] + jnp.arange(1 + J)[None]
        logits_BTV, cache = statics.model.extend(
            params,
            jnp.where(draws_B[:, None], tokens_BT, 0),
            jnp.where(draws_B[:, None], jnp.minimum(positions_BT, last), 0),
            cache,
            lengths_B=jnp.where(draws_B, 1 + drafted_B, 0),
            dtype=statics.dtype,
        )
        for j in range(1 + J):
            run = take(logits_BTV[:, j], draws_B, run)
            if j < J:
                is_right_B = (j < drafted_B) & (run.token_B == drafts_BJ[:, j])
                draws_B = draws_B & ~run.done_B & is_right_B
        return cache, run._replace(out=run.out._replace(steps=run.out.steps + 1))

    cache, run = jax.lax.while_loop(goes_on, step_on, (state.cache, run))
    state = state._replace(cache=cache, counts_BV=run.counts_BV, tokens_BL=run.tokens_BL)
    return state, run.out


def _drafts(statics: Statics, columns: Columns, run: _Run) -> tuple[jax.Array, jax.Array]:
    """Returns what may come next of each row, drafts_BJ, and how many of them mean anything.

    What came after the last time that the row's last few tokens stood together (Saxena 2023, "Prompt Lookup
    Decoding"): three tokens, or else two. What goes beyond the last token is as if the text went round from there.
    """
    B, J = len(run.token_B), statics.speculation
    if run.tokens_BL is None:
        return jnp.zeros((B, 0), jnp.int32), jnp.zeros(B, jnp.int32)
    places_L = jnp.arange(run.tokens_BL.shape[1])

    def of_row(tokens_L: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        matches_L, ends = places_L < position, []
        for n in range(_NGRAM):
            matches_L &= (jnp.roll(tokens_L, n) == tokens_L[position - n]) & (places_L >= n)
            ends.append(jnp.where(matches_L, places_L, -1).max())
        end = jnp.where(ends[-1] >= 0, ends[-1], ends[-2])
        is_found = (end >= 0) & (position >= _NGRAM - 1)
        round_J = jnp.arange(J) % jnp.maximum(position - end, 1)
        return tokens_L[end + 1 + round_J], jnp.where(is_found, J, 0)

    drafts_BJ, found_B = jax.vmap(of_row)(run.tokens_BL, run.position_B)
    left_B = columns.limit_B - columns.produced_B - run.out.count_B - 1
    return drafts_BJ, jnp.clip(left_B, 0, found_B)


def _take(
    statics: Statics,
    columns: Columns,
    keys_B: jax.Array,
    bias_BV: jax.Array,
    logits_BV: jax.Array,
    draws_B: jax.Array,
    run: _Run,
) -> _Run:
    """Draws the next token of the rows that `draws_B` names and books it; the others stay as they are."""
    B, V = logits_BV.shape
    position_B, readable_1V = run.position_B + 1, _readable(statics, V)[None]
    is_number_B = (jnp.isfinite(logits_BV) | ~readable_1V).all(-1)
    drawn_B = statics.sampler(
        jnp.where(readable_1V, logits_BV, -jnp.inf),
        jax.vmap(jax.random.fold_in)(keys_B, position_B),
        columns.settings,
        run.counts_BV,
        bias_BV,
        columns.produced_B + run.out.count_B,
        statics.stop_ids,
    )
    drawn_B = jnp.where(is_number_B, drawn_B, NO_NUMBER)
    rows_B = jnp.arange(B)

    def put(x: jax.Array, place_B: jax.Array, new_B: jax.Array) -> jax.Array:
        place_B = jnp.where(draws_B, place_B, x.shape[1])  # beyond the end: dropped
        return x.at[rows_B, place_B].set(new_B, mode="drop")

    is_stop_B = jnp.isin(drawn_B, jnp.array(statics.stop_ids, jnp.int32)) & ~columns.ignore_eos_B
    count_B = run.out.count_B + draws_B.astype(jnp.int32)
    is_last_B = columns.produced_B + count_B >= columns.limit_B

    def scored(scores: Scores) -> Scores:
        new = _score(logits_BV, drawn_B, statics.top_logprobs)
        return Scores(*(put(x, run.out.count_B, y) for x, y in zip(scores, new, strict=True)))

    wanted = (columns.wants_scores_B & draws_B).any()
    out = run.out._replace(
        tokens_BM=put(run.out.tokens_BM, run.out.count_B, drawn_B),
        count_B=count_B,
        scores=jax.lax.cond(wanted, scored, lambda scores: scores, run.out.scores),
    )
    tokens_BL = run.tokens_BL
    return _Run(
        counts_BV=run.counts_BV.at[rows_B, drawn_B].add(2 * draws_B.astype(jnp.int32)),
        tokens_BL=None if tokens_BL is None else put(tokens_BL, position_B, drawn_B),
        token_B=jnp.where(draws_B, drawn_B, run.token_B),
        position_B=jnp.where(draws_B, position_B, run.position_B),
        done_B=run.done_B | (draws_B & (is_stop_B | is_last_B | ~is_number_B)),
        out=out,
    )


def _score(
    logits_BV: jax.Array, drawn_B: jax.Array, K: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logprobs_BV, drawn_B[:, None], axis=-1)[:, 0]
    top_BK, ids_BK = jax.lax.top_k(logprobs_BV, K)
    return chosen_B, ids_BK, top_BK


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


def _note_tokens(
    tokens_BL: jax.Array | None, slot: Any, start: Any, tokens_1T: jax.Array
) -> jax.Array | None:
    if tokens_BL is None:
        return None
    return jax.lax.dynamic_update_slice(tokens_BL, tokens_1T, (slot, start))


def _request_key(words_4: jax.Array) -> jax.Array:
    """Returns what a request's tokens fold their positions into."""
    key = jax.random.key(0)
    for word in words_4:
        key = jax.random.fold_in(key, word)
    return key


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    statics: Statics, top: int, params: Params, tokens_1T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the log-probability of each token but the first, and the `top` likeliest ids and values there."""
    T = tokens_1T.shape[1]
    x_1TD, _ = statics.model.hidden_and_route(params, tokens_1T, dtype=statics.dtype)
    head_VD = statics.model.head(params)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        x_tD, next_t = chunk
        return _score(unembed(x_tD[None], head_VD)[0], next_t, top)

    pieces = _cut(x_1TD[0, :-1], SCORED), _cut(tokens_1T[0, 1:], SCORED)
    found = jax.lax.map(of_chunk, pieces)
    chosen_T, ids_TK, values_TK = (
        x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[: T - 1] for x in found
    )
    return chosen_T, ids_TK, values_TK


def _cut(x_T: jax.Array, size: int) -> jax.Array:
    """Returns x in pieces of `size`, or as one if it is shorter; the last one is padded."""
    size = max(1, min(size, len(x_T)))
    count = -(-len(x_T) // size)
    x_T = jnp.pad(x_T, [(0, count * size - len(x_T)), *[(0, 0)] * (x_T.ndim - 1)])
    return x_T.reshape(count, size, *x_T.shape[1:])
