"""What a precision costs: how much worse a model predicts a text, and how far its predictions move.

    python -m core.quality --model=models/gpt2 --text=book.txt --precision=bfloat16,int8

Perplexity, and against the same model in float32: the Kullback-Leibler divergence of the predictions in nats a token,
its mean and its largest, and how often the likeliest token is the same. The text goes through in windows, of which
every token but the first is predicted from those before it in the window; where windows overlap, the later one scores
what is new in it. Keys and values are rounded as in generation.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from core import door
from core.config import PRECISIONS
from core.errors import FlaxmillError

if TYPE_CHECKING:
    from core.models import Model, Params

_MODEL = flags.DEFINE_string("model", None, "The model folder.", required=True)
_TEXT = flags.DEFINE_string("text", None, "A file of text, in UTF-8.", required=True)
_PRECISION = flags.DEFINE_list("precision", "bfloat16,int8", f"Of {', '.join(PRECISIONS)}.")
_WINDOW = flags.DEFINE_integer(
    "window", 1024, "Tokens that are read at a time; at most the model's context.", lower_bound=2
)
_STRIDE = flags.DEFINE_integer(
    "stride", None, "From one window to the next; by default half a window.", lower_bound=1
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 32768, "So much of the text at most; 0 is all.", lower_bound=0
)
_JSON = flags.DEFINE_bool("json", False, "Prints one JSON object.")

REFERENCE = "float32"


class QualityError(FlaxmillError):
    """A text that nothing can be measured on."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of `tokens` predicted ones; divergences are from the float32 model."""

    tokens: int
    perplexity: float
    kl_mean: float
    kl_max: float
    same_argmax: float


class Window(NamedTuple):
    """Tokens `start` to `end`, of which those from `new` on have not been scored."""

    start: int
    end: int
    new: int


def main() -> None:
    precisions = list(dict.fromkeys([REFERENCE, *_PRECISION.value]))
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise door.Usage(f"--precision={unknown[0]} is none of {', '.join(PRECISIONS)}")
    if _STRIDE.value is not None and _STRIDE.value > _WINDOW.value:
        raise door.Usage(f"--stride={_STRIDE.value} leaves out tokens; at most {_WINDOW.value}")

    import tqdm

    import core
    from core import compiled

    compiled.keep()
    model, params, tokenizer = core.load(_MODEL.value)
    if tokenizer is None:
        raise QualityError(f"{_MODEL.value} has no tokenizer to read a text with")
    tokens = tokenizer.encode(_read(Path(_TEXT.value)))[: _MAX_TOKENS.value or None]
    window = min(_WINDOW.value, model.config.context_length)
    stride = _STRIDE.value or window // 2
    with tqdm.tqdm(total=len(tokens), unit=" tokens", unit_scale=True, disable=None) as progress:
        found = measure(
            model,
            params,
            tokens,
            precisions,
            window=window,
            stride=min(stride, window),
            on_tokens=progress.update,
        )
    write = _write_json if _JSON.value else _write_table
    write(found, window=window, stride=min(stride, window))


def measure(
    model: "Model",
    params: "Params",
    tokens: Sequence[int],
    precisions: Sequence[str],
    *,
    window: int,
    stride: int,
    on_tokens: Callable[[int], Any] = lambda count: None,
) -> dict[str, Quality]:
    """Returns the quality of each precision on `tokens`; all of them are in memory at once.

    Args:
      model: from `core.load`.
      params: its parameters.
      tokens: the text, two tokens at least.
      precisions: of `core.config.PRECISIONS`.
      window: tokens that are read at a time, 2 or more.
      stride: from one window's beginning to the next one's, 1 to `window`.
      on_tokens: told how many tokens have just been scored.

    Raises:
      QualityError: there are not two tokens in the text or a window, or one is not in the vocabulary.
    """
    import numpy as np

    from core.precision import prepare

    vocab_size = model.config.vocab_size
    if len(tokens) < 2:
        raise QualityError(f"the text has {len(tokens)} tokens; one is predicted from another")
    if window < 2:
        raise QualityError(f"a window of {window} tokens predicts nothing; it needs 2 or more")
    if wrong := [t for t in tokens if not 0 <= t < vocab_size]:
        raise QualityError(f"token {wrong[0]} is outside the model's vocabulary of {vocab_size}")
    reference = prepare(model, params, REFERENCE)
    others = {name: prepare(model, params, name) for name in precisions}
    sums = {name: np.zeros(4) for name in precisions}
    size = min(window, len(tokens))
    for place in windows(len(tokens), size, stride):
        tokens_1T = np.zeros((1, size), np.int32)
        tokens_1T[0, : place.end - place.start] = tokens[place.start : place.end]
        targets_T = np.roll(tokens_1T[0], -1)
        predicted_T = place.start + 1 + np.arange(size)
        counted_T = (predicted_T >= place.new) & (predicted_T < place.end)
        exact_TV = _logprobs(reference, tokens_1T)
        for name, prepared in others.items():
            rounded_TV = exact_TV if name == REFERENCE else _logprobs(prepared, tokens_1T)
            found = np.asarray(_compare()(exact_TV, rounded_TV, targets_T, counted_T), np.float64)
            sums[name][:3] += found[:3]
            sums[name][3] = max(sums[name][3], found[3])
        on_tokens(place.end - place.new)
    return {name: _quality(len(tokens) - 1, *sums[name]) for name in precisions}


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Yields the windows of `length` tokens; each token but the first is new in one of them.

    >>> [tuple(w) for w in windows(10, 4, 3)]
    [(0, 4, 1), (3, 7, 4), (6, 10, 7)]
    >>> [tuple(w) for w in windows(5, 4, 4)]
    [(0, 4, 1), (3, 5, 4)]
    """
    start, new = 0, 1
    while new < length:
        # A token that begins a window is predicted by none, unless the window before reaches it.
        start = min(start, new - 1)
        end = min(start + window, length)
        yield Window(start, end, new)
        new, start = end, start + stride


def _logprobs(prepared: Any, tokens_1T: Any) -> Any:
    return _forward()(*prepared[:1], *prepared[2:], prepared.params, tokens_1T)


@functools.cache
def _forward() -> Any:
    """Returns the compiled function; JAX is imported when it is first needed."""
    import jax
    import jax.numpy as jnp

    from core.kv_cache import KVCache

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def forward(model: Any, dtype: Any, cache_dtype: Any, params: Any, tokens_1T: Any) -> Any:
        T = tokens_1T.shape[1]
        cache = KVCache.zeros(model.config, 1, T, cache_dtype)
        positions_1T = jnp.arange(T)[None]
        logits_1TV, _ = model.extend(params, tokens_1T, positions_1T, cache, dtype=dtype)
        return jax.nn.log_softmax(logits_1TV[0], axis=-1)

    return forward


@functools.cache
def _compare() -> Any:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def compare(exact_TV: Any, rounded_TV: Any, targets_T: Any, counted_T: Any) -> Any:
        """Returns sums over the tokens that count: of surprise, divergence and agreement; the largest divergence."""
        surprise_T = -jnp.take_along_axis(rounded_TV, targets_T[:, None], axis=-1)[:, 0]
        more_TV = exact_TV - rounded_TV
        # The mean of `more` is that of more + 1/e^more - 1, whose terms are none of them negative: nothing cancels.
        terms_TV = jnp.where(
            more_TV > -10,
            jnp.exp(exact_TV) * (more_TV + jnp.expm1(-more_TV)),
            jnp.exp(rounded_TV) + jnp.exp(exact_TV) * (more_TV - 1),
        )
        kl_T = terms_TV.sum(-1)
        same_T = (exact_TV.argmax(-1) == rounded_TV.argmax(-1)).astype(jnp.float32)
        sums = [jnp.where(counted_T, x, 0).sum() for x in (surprise_T, kl_T, same_T)]
        return jnp.stack([*sums, jnp.where(counted_T, kl_T, 0).max()])

    return compare


def _quality(tokens: int, surprise: float, kl: float, same: float, kl_max: float) -> Quality:
    mean = surprise / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Quality(tokens, perplexity, kl / tokens, float(kl_max), same / tokens)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QualityError(f"the text {path} cannot be read: {error}") from error


def _write_json(found: dict[str, Quality], *, window: int, stride: int) -> None:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    rows = {
        name: {key: number(value) for key, value in dataclasses.asdict(quality).items()}
        for name, quality in found.items()
    }
    told = {"model": _MODEL.value, "text": _TEXT.value, "window": window, "stride": stride}
    print(json.dumps(told | {"precisions": rows}))


def _write_table(found: dict[str, Quality], *, window: int, stride: int) -> None:
    tokens = found[REFERENCE].tokens
    print(
        f"{_TEXT.value}: {tokens:,} tokens predicted, windows of {window}, a new one every {stride}"
    )
    print(f"{'':10}{'perplexity':>12}{'KL mean':>12}{'KL largest':>12}{'same argmax':>13}")
    for name, quality in found.items():
        numbers = f"{quality.kl_mean:12.2e}{quality.kl_max:12.2e}{quality.same_argmax:13.2%}"
        print(f"{name:10}{quality.perplexity:12.4f}{numbers}")


if __name__ == "__main__":
    door.run(main)
