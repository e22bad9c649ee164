"""The run's configuration: nanoGPT's flat names and defaults, checked before anything is touched.

A key that names something this trainer does not do yet is refused when it is set, never ignored.
What the model's own config looks like is `core.config`'s business.
"""

import dataclasses
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run can be told. Raises ConfigError naming every problem at once."""

    # Where the run lives, how often it is looked at.
    out_dir: str = "out"
    overwrite: bool = False  # start again over an earlier run in out_dir
    eval_interval: int = 2000
    log_interval: int = 1
    eval_iters: int = 200
    eval_only: bool = False
    always_save_checkpoint: bool = True  # else only when the validation loss improves
    eval_mode: str = (
        "sample"  # sample: eval_iters batches of each split | full: all of val, in order
    )
    ckpt_interval: int = 0  # further checkpoints every so many iterations; 0 = at evaluations only
    keep_last: int = 2  # checkpoints; the best by validation loss is kept beside them
    keep_every: int = 0  # and for good those of iterations that this divides; 0 = none
    # scratch | resume | auto | gpt2[-medium|-large|-xl] | a model folder
    init_from: str = "scratch"
    dry_run: bool = False  # say what the run would be and take, and write nothing
    overfit_batch: bool = (
        False  # every update sees the first batch: a loss that does not fall is a bug
    )
    sample_tokens: int = 0  # tokens to write after each evaluation, of sample_prompt's continuation
    sample_prompt: str = "\n"
    profile_start: int = 10  # the first of profile_steps iterations that jax.profiler traces
    profile_steps: int = 0
    tensorboard: bool = False
    wandb_log: bool = False
    wandb_project: str = "owt"
    wandb_run_name: str = "gpt2"

    # Data. Sequences in one update = gradient_accumulation_steps * batch_size.
    data_dir: str = "data"
    dataset: str = "openwebtext"
    data_order: str = (
        "random"  # random: windows anywhere, as nanoGPT | epoch: each window once an epoch
    )
    gradient_accumulation_steps: int = 40
    batch_size: int = 12
    block_size: int = 1024
    seed: int = 1337

    # Model.
    family: str = (
        "gpt2"  # gpt2 | gpt_oss: of a model from scratch; the next four are gpt_oss's alone
    )
    n_kv_head: int = 0  # 0 = n_head
    n_expert: int = 8
    experts_per_token: int = 2
    sliding_window: int = 128
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False

    optimizer: str = "adamw"  # adamw | muon: Muon for the blocks' matrices, AdamW for the rest
    # AdamW and its learning rate: max_iters + 1 updates, as nanoGPT's loop makes them.
    learning_rate: float = 6e-4
    max_iters: int = 600_000
    weight_decay: float = 1e-1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0  # global norm; 0 = no clipping
    decay_lr: bool = True
    warmup_iters: int = 2000
    lr_decay_iters: int = 600_000
    min_lr: float = 6e-5
    lr_schedule: str = "cosine"  # cosine | linear | wsd: constant, then linear over cooldown_iters
    cooldown_iters: int = 0
    ema_decay: float = (
        0.0  # of an average of the weights, which is what is evaluated and kept; 0 = none
    )
    skip_spikes: float = (
        0.0  # leave out updates whose gradient's norm is so many deviations high; 0 = none
    )

    # System.
    backend: str = "nccl"
    device: str = "auto"  # auto | cpu | cuda | cuda:N | tpu
    # auto | float32 | bfloat16 | float16; auto is bfloat16 except on the CPU
    dtype: str = "auto"
    loss_scale: float = 65536.0  # float16: where the loss scale starts,
    loss_scale_interval: int = 2000  # and after how many good updates it doubles
    attention: str = "auto"  # auto | xla | cudnn | splash
    remat: str = "none"  # none | dots | residual | full: what a block keeps for its backward pass
    scan_layers: bool = (
        False  # layers as a loop over one block, in which remat saves memory on a CPU too
    )
    mesh: str = "data=-1"  # devices along data, fsdp, expert and tensor; -1 is what is left
    coordinator: str = ""  # HOST:PORT of process 0, if there are several
    processes: int = 1
    process: int = 0  # this one's number
    dist_timeout_s: int = 300  # how long to wait for the others
    compile_cache: str = "auto"  # auto | off | a folder: where compiled programs are kept
    loss_chunk: int = 0  # positions whose logits are formed at a time; 0 = as many as fit in 268 MB
    compile: bool = True  # False runs op by op, for debugging
    deterministic: bool = False  # GPUs: the same bits in every run, more slowly

    def __post_init__(self) -> None:
        problems = list(_wrong_types(self)) or list(_problems(self))
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A config from a plain mapping; whole numbers are taken where a float is meant."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = [_unknown_key(key, list(known)) for key in values if key not in known]
        if unknown:
            raise ConfigError("; ".join(unknown))
        floats = {name for name, field in known.items() if field.type is float}
        checked: dict[str, Any] = {
            key: float(value) if key in floats and _whole(value) else value
            for key, value in values.items()
        }
        return cls(**checked)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def sequences_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.block_size


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f' Did you mean "{near[0]}"?' if near else " docs/training.md lists the keys."
    return f'unknown config key "{key}".{hint}'


def _wrong_types(config: TrainConfig) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is not field.type:
            expected = getattr(field.type, "__name__", field.type)
            yield f"{field.name}={value!r} is {type(value).__name__}, expected {expected}"


_ONE_OF = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attention": ("auto", "xla", "cudnn", "splash"),
    "remat": ("none", "dots", "residual", "full"),
    "eval_mode": ("sample", "full"),
    "data_order": ("random", "epoch"),
    "lr_schedule": ("cosine", "linear", "wsd"),
    "family": ("gpt2", "gpt_oss"),
    "optimizer": ("adamw", "muon"),
}

_AT_LEAST = {
    "eval_interval": 1,
    "log_interval": 1,
    "eval_iters": 1,
    "ckpt_interval": 0,
    "keep_last": 1,
    "keep_every": 0,
    "sample_tokens": 0,
    "profile_start": 0,
    "profile_steps": 0,
    "cooldown_iters": 0,
    "skip_spikes": 0,
    "loss_scale_interval": 1,
    "loss_chunk": 0,
    "processes": 1,
    "process": 0,
    "dist_timeout_s": 1,
    "gradient_accumulation_steps": 1,
    "batch_size": 1,
    "block_size": 1,
    "seed": 0,
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 1,
    "n_kv_head": 0,
    "n_expert": 1,
    "experts_per_token": 1,
    "sliding_window": 1,
    "learning_rate": 0,
    "max_iters": 0,
    "weight_decay": 0,
    "grad_clip": 0,
    "warmup_iters": 0,
    "min_lr": 0,
}


def _problems(c: TrainConfig) -> Iterator[str]:
    for name, least in _AT_LEAST.items():
        if not getattr(c, name) >= least:  # "not >=" also catches nan
            yield f"{name}={getattr(c, name)} must be at least {least}"
    if c.seed >= 2**63:
        yield f"seed={c.seed} must be less than 2**63"
    for name in ("dropout", "beta1", "beta2", "ema_decay"):
        if not 0 <= getattr(c, name) < 1:
            yield f"{name}={getattr(c, name)} must be in [0, 1)"
    for name in ("eps", "loss_scale"):
        if not getattr(c, name) > 0:
            yield f"{name}={getattr(c, name)} must be greater than 0"
    if c.n_head > 0 and c.n_embd % c.n_head:
        yield f"n_embd={c.n_embd} is not divisible by n_head={c.n_head}"
    if c.family == "gpt_oss":
        yield from _gpt_oss_problems(c)
    yield from _without_effect(c)
    if c.decay_lr and c.lr_decay_iters <= c.warmup_iters:
        yield f"lr_decay_iters={c.lr_decay_iters} must be greater than warmup_iters={c.warmup_iters}"
    if c.lr_schedule == "wsd" and not 0 < c.cooldown_iters <= c.lr_decay_iters - c.warmup_iters:
        yield (
            f"lr_schedule='wsd' ends with cooldown_iters={c.cooldown_iters}; expected 1 to "
            f"lr_decay_iters - warmup_iters = {c.lr_decay_iters - c.warmup_iters}"
        )
    for name, values in _ONE_OF.items():
        if getattr(c, name) not in values:
            yield f"{name}={getattr(c, name)!r}: expected {' or '.join(values)}"
    if c.process >= c.processes >= 1:
        yield f"process={c.process} is none of processes={c.processes}, which count from 0"
    if c.processes > 1 and not _is_address(c.coordinator):
        yield f"processes={c.processes} meet at coordinator={c.coordinator!r}; expected HOST:PORT"
    if c.processes > 1 and c.sample_tokens:
        yield f"sample_tokens={c.sample_tokens} with processes={c.processes}: one process can sample"
    for name in ("out_dir", "dataset", "init_from", "compile_cache"):
        if not getattr(c, name):
            yield f"{name} must not be empty"
    yield from _not_honoured(c)


def _gpt_oss_problems(c: TrainConfig) -> Iterator[str]:
    if c.n_kv_head > 0 and c.n_head % c.n_kv_head:
        yield f"n_head={c.n_head} is not divisible by n_kv_head={c.n_kv_head}"
    if c.n_head > 0 and c.n_embd // c.n_head % 2:
        yield f"n_embd / n_head = {c.n_embd // c.n_head} is odd; rotary positions need an even head"
    if c.experts_per_token > c.n_expert:
        yield f"experts_per_token={c.experts_per_token} is more than n_expert={c.n_expert}"


def _without_effect(c: TrainConfig) -> Iterator[str]:
    """Keys that were set, of which nothing would come."""
    if c.init_from in ("scratch", "auto"):  # else the weights say which family they are
        for name in keys_without_effect(c, c.family):
            yield f"{name}={getattr(c, name)} has no effect on family={c.family}; leave it out"
    if c.cooldown_iters and c.lr_schedule != "wsd":
        yield f"cooldown_iters={c.cooldown_iters} has no effect without lr_schedule=wsd"
    if c.profile_steps and c.profile_start > c.max_iters:
        yield f"profile_start={c.profile_start} is beyond max_iters={c.max_iters}: nothing is traced"


_ONLY_OF = {
    "gpt2": ("bias",),
    "gpt_oss": ("n_kv_head", "n_expert", "experts_per_token", "sliding_window"),
}


def keys_without_effect(c: TrainConfig, family: str) -> list[str]:
    """Returns the keys that were set, to something else than their default, although only other families have them."""
    default = {field.name: field.default for field in dataclasses.fields(c)}
    others = [key for other, keys in _ONLY_OF.items() if other != family for key in keys]
    return [key for key in others if getattr(c, key) != default[key]]


def _not_honoured(c: TrainConfig) -> Iterator[str]:
    """What nanoGPT's keys can ask for and this trainer cannot give (yet)."""
    for key, module in (("wandb_log", "wandb"), ("tensorboard", "tensorboardX")):
        if getattr(c, key) and importlib.util.find_spec(module) is None:
            extra = key.removesuffix("_log")
            yield (
                f"{key}=True needs {module}, which is not installed; it is in the extra: "
                f"pip install 'flaxmill-train[{extra}]'. metrics.jsonl is always written"
            )
    if c.backend not in ("nccl", "gloo"):
        yield f"backend={c.backend!r}: expected 'nccl' or 'gloo' (read only by multi-process runs)"
    if c.device == "mps":
        yield "device='mps': jax has no backend for it here; use device='cpu'"
    elif c.device not in ("auto", "cpu", "cuda", "tpu") and not _is_numbered_cuda(c.device):
        yield f"device={c.device!r}: expected auto, cpu, cuda, cuda:N or tpu"


def _is_address(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


def _is_numbered_cuda(device: str) -> bool:
    name, _, index = device.partition(":")
    return name == "cuda" and index.isdecimal()
