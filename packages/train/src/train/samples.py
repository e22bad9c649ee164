"""A few tokens in between, to see what the losses mean."""

from core.engine import Engine
from core.models import Model, Params
from core.sampling import Sampling
from core.tokenizer import Tokenizer
from train.config import TrainConfig


def continuation(model: Model, params: Params, tokenizer: Tokenizer, config: TrainConfig) -> str:
    """Returns `sample_tokens` tokens after `sample_prompt`, drawn as nanoGPT's sample.py draws them."""
    sampling = Sampling(
        max_new_tokens=config.sample_tokens, temperature=0.8, top_k=200, seed=config.seed
    )
    return Engine(model, params, tokenizer, slots=1).generate([config.sample_prompt], sampling)[0]
