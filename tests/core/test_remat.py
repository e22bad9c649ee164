"""What a block keeps for its backward pass: seen in the program before XLA, whose CPU backend keeps all the same."""

import dataclasses

import jax
import pytest

import tiny
from core import Batch, loss
from core.models import Compute, build


@pytest.fixture(scope="module")
def products() -> dict[str, int]:
    """How many products a loss and its gradient take, by what is kept."""
    config = tiny.config()
    tokens = tiny.tokens(config, 2, 6)
    params = jax.eval_shape(build(config).init, jax.random.key(0))
    found = {}
    for remat in ("none", "dots", "residual", "full"):
        model = dataclasses.replace(build(config), compute=Compute(remat))
        grads = jax.jit(
            jax.grad(lambda p, m=model: loss(p, m, Batch(tokens[:, :-1], tokens[:, 1:])))
        )
        found[remat] = grads.lower(params).as_text().count("stablehlo.dot_general")
    return found


def test_what_is_not_kept_is_multiplied_again(products: dict[str, int]):
    """Of a block's six products: attention's two; those, qkv and up; and out too. Nothing asks for down's result."""
    again = {name: count - products["none"] for name, count in products.items()}
    L = tiny.config().n_layer
    assert again == {"none": 0, "dots": 2 * L, "residual": 4 * L, "full": 5 * L}
