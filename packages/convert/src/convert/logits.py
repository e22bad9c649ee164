"""Our logits beside torch's in float32: on random ids, on English, on a full context; and the first layer that differs.

The reference is transformers on the original checkpoint, if that is Hugging Face's, so that nothing of ours comes
between; else on an export of ours. What two right implementations may differ by is measured and not assumed: torch
runs in float64 too, and a few times the distance of its own float32 from that is allowed.

This is the one module of the packages that imports torch and transformers, and only when it is called.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import exporter, importer, progress, tables
from convert.errors import ConvertError
from convert.sources import safetensors
from core.checkpoint import ModelFolder
from core.config import Config
from core.errors import ConfigError, TokenizerError
from core.tokenizer import Tokenizer

# George Eliot, "Silas Marner: The Weaver of Raveloe" (1861), its first sentences.
_TEXT = (
    "In the days when the spinning-wheels hummed busily in the farmhouses, and even great ladies, clothed in silk and "
    "thread-lace, had their toy spinning-wheels of polished oak, there might be seen in districts far away among the "
    "lanes, or deep in the bosom of the hills, certain pallid undersized men, who, by the side of the brawny "
    "country-folk, looked like the remnants of a disinherited race. The shepherd's dog barked fiercely when one of "
    "these alien-looking men appeared on the upland, dark against the early winter sunset; for what dog likes a figure "
    "bent under a heavy bag? And these pale men rarely stirred abroad without that mysterious burden."
)
_RANDOM_TOKENS = 64
_LONG_TOKENS = 1024  # beyond, float64 takes minutes, and logits of a large vocabulary gigabytes

# Two right float32 implementations differ from each other by up to 2.5 times what torch's differs from float64, and the
# smallest mistake met, erf for tanh in GELU, by 50 times. `_FLOOR`, relative to the spread of the values, is for points
# where torch is exact by chance.
_NOISES = 10
_FLOOR = 2e-5


@dataclasses.dataclass(frozen=True)
class _Names:
    """What transformers calls our `blocks`, the modules in a block, and the last norm: ours to theirs."""

    blocks: str
    modules: Mapping[str, str]
    norm: tuple[str, str]


_FAMILIES = {
    "gpt2": _Names(
        "transformer.h", {"attn": "attn", "mlp": "mlp"}, norm=("ln_f", "transformer.ln_f")
    ),
    "gpt_oss": _Names(
        "model.layers", {"attn": "self_attn", "moe": "mlp"}, norm=("norm_f", "model.norm")
    ),
}
_AS_IT_LIES = {"local_files_only": True, "trust_remote_code": False}
_FIRST_BLOCK, _LOGITS = "blocks.0", "lm_head"


@dataclasses.dataclass(frozen=True)
class Row:
    """How the logits of one input differ; `allowed` is the largest difference that rounding explains."""

    name: str
    tokens: int
    largest: float
    mean: float
    allowed: float
    kl: float
    same_argmax: float

    @property
    def agrees(self) -> bool:
        return self.largest <= self.allowed  # which no NaN is


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row for each input, what the reference was, and the first point on the way to the logits that differs."""

    reference: str
    rows: tuple[Row, ...]
    first: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{'logits':<8}{'tokens':>7}{'max |d|':>10}{'allowed':>10}{'mean |d|':>10}{'KL':>10}{'argmax':>9}"
        lines = [
            f"{row.name:<8}{row.tokens:>7,}{row.largest:>10.1e}{row.allowed:>10.1e}{row.mean:>10.1e}{row.kl:>10.1e}"
            f"{row.same_argmax:>9.2%}" + ("" if row.agrees else "  differs")
            for row in self.rows
        ]
        first = [f"first differing layer: {self.first}"] if self.first is not None else []
        return "\n".join([f"float32 against {self.reference}", head, *lines, *first])

    @property
    def problems(self) -> list[str]:
        """Returns nothing, or the one line that says what differs."""
        differing = [row for row in self.rows if not row.agrees]
        if not differing:
            return []
        worst = max(differing, key=lambda row: row.largest - row.allowed)
        names = ", ".join(row.name for row in differing)
        return [
            f"the logits differ from {self.reference} from {self.first} on "
            f"(on {names} ids; by {worst.largest:.1e}, where {worst.allowed:.1e} is rounding)"
        ]


def check_possible(config: Config) -> None:
    """Checks that a model of this family can be run, here and in torch.

    Raises:
      ConvertError: it cannot, or torch or transformers is not installed.
    """
    from core import models

    if getattr(config, "quantization", None) == "int8":
        raise ConvertError(
            "the logits cannot be compared: torch has no model with these int8 kernels; leave --logits away"
        )
    try:
        models.build(config)
    except ConfigError as error:
        raise ConvertError(f"the logits cannot be compared: {error}") from error
    if config.family not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ConvertError(f"the logits can be compared for {known}; this is a {config.family}")
    _import()


def compare(
    folder: ModelFolder, plan: importer.Plan | None, *, quiet: bool | None = None
) -> Comparison:
    """Compares the logits of `folder` with those of the source of `plan`, or of its own export without one.

    Torch and we each hold the model in float32, torch for a while in float64.

    Raises:
      ConvertError: transformers does not open the reference, or that is a model of other sizes.
    """
    config = folder.config
    if plan is not None and plan.config.axes != config.axes:
        raise ConvertError(
            f"the logits cannot be compared: {plan.source.path} is a model of other sizes than {folder.path}"
        )
    inputs, notes = _inputs(folder)
    rounded = _rounded(folder)
    with _reference(folder, plan, quiet) as (path, reference):

        def run(verb: str, inputs: Mapping[str, np.ndarray], places: Mapping[str, str]) -> _Found:
            makers = (
                lambda: _ours(folder, places),
                lambda: _theirs(path, "float32", rounded, places),
                lambda: _theirs(path, "float64", rounded, places),
            )
            return _run(makers, inputs, verb, quiet)

        found = run("comparing logits", inputs, {})
        rows = tuple(_row(name, *(x[_LOGITS] for x in found[name])) for name in inputs)
        first = None
        if differing := [row.name for row in rows if not row.agrees]:
            del found
            name, places = differing[0], _places(config)
            on_the_way = run("comparing layers", {name: inputs[name]}, places)
            first = _first(places, *on_the_way[name])
    if rounded is not None:
        reference += f" with its weights in {rounded}"
    return Comparison(reference, rows, first, tuple(notes))


def _import() -> tuple[Any, Any]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConvertError(
            f"--logits compares with torch, and {error.name or error} is not installed: "
            "`uv pip install torch transformers`, or run it from .venv-peers"
        ) from error
    return torch, transformers


def _inputs(folder: ModelFolder) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the ids_BT to compare on, by name, and what the user should know of them."""
    config, rng, notes = folder.config, np.random.default_rng(0), []
    V, context = config.vocab_size, config.context_length
    inputs = {"random": rng.integers(0, V, (2, min(_RANDOM_TOKENS, context)))}
    text_T, why = _encoded(folder)
    if why:
        notes.append(f"no text among the inputs of --logits: {why}")
    else:
        inputs["text"] = np.array([text_T[:context]])
    if context > _LONG_TOKENS:
        notes.append(f"the longest input of --logits has {_LONG_TOKENS:,} of {context:,} positions")
    # Every id once before any comes twice: each has a row of its own that may be wrong.
    inputs["long"] = np.resize(rng.permutation(V), (1, min(_LONG_TOKENS, context)))
    return inputs, notes


def _encoded(folder: ModelFolder) -> tuple[list[int], str]:
    """Returns the paragraph's ids, or why there are none."""
    try:
        tokenizer = Tokenizer.find(folder.path)
        ids_T = tokenizer.encode(_TEXT) if tokenizer is not None else []
    except (TokenizerError, OSError) as error:
        return [], str(error)
    if not ids_T:
        return [], "the folder has no tokenizer"
    if max(ids_T) >= folder.config.vocab_size:
        return [], f"the tokenizer gives id {max(ids_T)}, the model has {folder.config.vocab_size}"
    return ids_T, ""


def _rounded(folder: ModelFolder) -> str | None:
    """Returns the one 16-bit type of all the folder's weights, if that is so.

    A conversion may have cast them all to it. Rounding the original's likewise is nothing where it had that type.
    """
    kinds = {x.dtype.name for x in folder.tensors.values()} - {"uint8"}
    return kinds.pop() if len(kinds) == 1 and kinds != {"float32"} else None


@contextlib.contextmanager
def _reference(
    folder: ModelFolder, plan: importer.Plan | None, quiet: bool | None
) -> Iterator[tuple[Path, str]]:
    """Gives a folder that transformers opens, and what that is in words."""
    if plan is not None and _is_hugging_face(plan):
        yield plan.source.path, f"transformers on {plan.source.path}"
        return
    with tempfile.TemporaryDirectory(prefix="flaxmill-logits-") as scratch:
        model, what = folder.path, "our own export of the folder"
        if plan is not None:
            model = importer.write(plan, Path(scratch, "model"), quiet=quiet)
            what = f"our own conversion and export of {plan.source.path}"
        out = Path(scratch, "hf")
        yield exporter.export(model, to="hf", out=out, quiet=quiet), f"transformers on {what}"


def _is_hugging_face(plan: importer.Plan) -> bool:
    """Tells whether transformers opens the source itself, and takes the same files of it as we do."""
    source = plan.source
    dialect = tables.recognize(source.path, source.config, source.tensors)
    if dialect is not tables.HF or not source.path.is_dir():
        return False
    if source.format == "torch":  # transformers takes safetensors where there are both
        return not any((source.path / n).exists() for n in (safetensors.SINGLE, safetensors.INDEX))
    return source.format == "safetensors"


Run = Callable[[np.ndarray], dict[str, np.ndarray]]
"""From ids_BT to what passes on the way at some points, and the logits."""
_Found = dict[str, list[dict[str, np.ndarray]]]
"""For each input what every `Run` gave."""


def _run(
    makers: Sequence[Callable[[], Run]],
    inputs: Mapping[str, np.ndarray],
    verb: str,
    quiet: bool | None,
) -> _Found:
    """Returns what each of the models gives for each input, with one model in memory at a time."""
    found: _Found = {name: [] for name in inputs}
    with progress.steps(verb, len(makers) * (len(inputs) + 1), quiet) as done:
        for make in makers:
            run = make()
            done()
            for name, ids_BT in inputs.items():
                found[name].append(run(ids_BT))
                done()
            del run
    return found


def _places(config: Config) -> dict[str, str]:
    """Returns the points to look at on the way to the logits, in order: our module and transformers'.

    Of the first block it is the input that is looked at, which is the embedding; of all others the output.
    """
    names = _FAMILIES[config.family]
    inside = {
        f"blocks.{layer}.{ours}": f"{names.blocks}.{layer}.{theirs}"
        for layer in range(config.axes["L"])
        for ours, theirs in names.modules.items()
    }
    return {_FIRST_BLOCK: f"{names.blocks}.0", **inside, names.norm[0]: names.norm[1]}


def _named(place: str) -> str:
    return "embedding" if place == _FIRST_BLOCK else place


def _passing(place: str, args: Any, result: Any) -> Any:
    """Returns what is looked at, of what our or torch's module is given and gives."""
    if place == _FIRST_BLOCK:
        return args[0]
    return result[0] if isinstance(result, tuple) else result


def _ours(folder: ModelFolder, places: Mapping[str, str]) -> Run:
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from core import models

    model, params = models.build(folder.config), folder.params()

    @jax.jit
    def run(params: Any, ids_BT: jax.Array) -> dict[str, jax.Array]:
        seen: dict[str, jax.Array] = {}

        def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            result = call(*args, **kwargs)
            if (place := ".".join(context.module.path)) in places:
                seen[_named(place)] = _passing(place, args, result)
            return result

        with nn.intercept_methods(look):
            return {_LOGITS: model.apply(params, ids_BT), **seen}

    def numbers(ids_BT: np.ndarray) -> dict[str, np.ndarray]:
        with jax.default_matmul_precision("highest"):  # an accelerator would round to 10 bits
            return jax.device_get(run(params, jnp.asarray(ids_BT, jnp.int32)))

    return numbers


def _theirs(path: Path, dtype: str, rounded: str | None, places: Mapping[str, str]) -> Run:
    torch, _ = _import()
    model = _load(path, dtype)
    if rounded is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, rounded)))
    seen: dict[str, Any] = {}

    def look(place: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, result: Any) -> None:
            seen[_named(place)] = _passing(place, args, result)

        return hook

    for place, module in places.items():
        model.get_submodule(module).register_forward_hook(look(place))

    def run(ids_BT: np.ndarray) -> dict[str, np.ndarray]:
        seen.clear()
        with torch.no_grad():
            logits_BTV = model(torch.from_numpy(ids_BT), use_cache=False).logits
        return {point: x.numpy() for point, x in {_LOGITS: logits_BTV, **seen}.items()}

    return run


def _load(path: Path, dtype: str) -> Any:
    """Returns transformers' model, in its plainest implementation, which is the one that knows float64."""
    torch, transformers = _import()
    settings = {}
    try:
        with _silent(transformers):
            config = transformers.AutoConfig.from_pretrained(path, **_AS_IT_LIES)
            if getattr(config, "quantization_config", None) is not None:
                settings = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
            if getattr(config, "reorder_and_upcast_attn", False):
                config.reorder_and_upcast_attn = False  # all is float32, and float64 it refuses
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
                **_AS_IT_LIES,
                **settings,
            )
    except Exception as error:  # of many kinds
        raise ConvertError(f"{path}: transformers cannot open it: {error}") from error
    if absent := sorted({*info["missing_keys"], *info["mismatched_keys"]}):
        raise ConvertError(f"{path}: transformers does not find {', '.join(map(str, absent[:3]))}")
    return model.eval()


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Keeps transformers from telling what it does and what it thinks of the checkpoint."""
    logging = transformers.utils.logging
    verbosity, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows:
            logging.enable_progress_bar()


def _row(name: str, ours_BTV: np.ndarray, theirs_BTV: np.ndarray, exact_BTV: np.ndarray) -> Row:
    largest, allowed = _gap(ours_BTV, theirs_BTV, exact_BTV)
    count, total, kl, same = 0, 0.0, 0.0, 0
    for ours_TV, theirs_TV in _in_rows(ours_BTV, theirs_BTV):
        count += len(ours_TV)
        total += np.abs(ours_TV - theirs_TV).mean(axis=-1).sum()
        ours_logp_TV, theirs_logp_TV = _log_softmax(ours_TV), _log_softmax(theirs_TV)
        kl += (np.exp(theirs_logp_TV) * (theirs_logp_TV - ours_logp_TV)).sum()
        same += int((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum())
    return Row(name, count, largest, total / count, allowed, kl / count, same / count)


def _first(
    places: Iterable[str],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
) -> str:
    """Returns the first point on the way that differs by more than rounding."""
    for place in places:
        point = _named(place)
        largest, allowed = _gap(ours[point], theirs[point], exact[point])
        if not largest <= allowed:
            return point
    return _LOGITS


def _gap(ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Returns the largest difference between ours and theirs, and the largest that rounding explains."""
    largest, noise, variances = 0.0, 0.0, []
    for ours_TD, theirs_TD, exact_TD in _in_rows(ours, theirs, exact):
        largest = np.maximum(largest, np.abs(ours_TD - theirs_TD).max())  # which keeps a NaN
        noise = np.maximum(noise, np.abs(theirs_TD - exact_TD).max())
        variances.append(exact_TD.var(axis=-1))
    spread = np.sqrt(np.concatenate(variances).mean())
    return float(largest), float(_NOISES * noise + _FLOOR * spread)


def _in_rows(*arrays: np.ndarray, count: int = 64) -> Iterator[list[np.ndarray]]:
    """Gives the vectors along the last axis of several arrays, `count` at a time, in float64."""
    flat = [x.reshape(-1, x.shape[-1]) for x in arrays]
    for start in range(0, len(flat[0]), count):
        yield [x[start : start + count].astype(np.float64) for x in flat]


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted_TV = logits_TV - logits_TV.max(axis=-1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(axis=-1, keepdims=True))
