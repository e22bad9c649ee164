"""Layers in a scan: the same numbers as one after another, and a program that does not grow with them."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import tiny
import tiny_gpt_oss
from core import Batch, loss
from core.config import Config, GptOssConfig
from core.models import Compute, build

DROPPED = {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}
WINDOWS = ("sliding_attention", "full_attention") * 2


def loss_of(config: Config, key: jax.Array | None, scan_layers: bool, remat: str = "none") -> Any:
    model = dataclasses.replace(build(config), compute=Compute(remat, scan_layers=scan_layers))
    tokens = tiny.tokens(config, 2, 7)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    return jax.jit(jax.value_and_grad(lambda p: loss(p, model, batch, dropout_key=key)))


@pytest.mark.parametrize(
    ("config", "remat"),
    [
        pytest.param(tiny.config(n_layer=3, **DROPPED), "none", marks=pytest.mark.slow),
        (tiny.config(scale_attn_by_inverse_layer_idx=True), "full"),
        pytest.param(
            tiny_gpt_oss.config(num_hidden_layers=4, layer_types=WINDOWS, sliding_window=3),
            "dots",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dropout", "no two layers alike", "windows take turns"],
)
def test_a_scan_gives_the_same_loss_and_gradients(config: Config, remat: str):
    """Experts' load balance, which is in the loss, is what the routers of all layers say."""
    if isinstance(config, GptOssConfig):
        params = tiny_gpt_oss.params(tiny_gpt_oss.weights(config))
    else:
        params = tiny.params(build(config))
    key = jax.random.key(1)
    expected, slopes = loss_of(config, key, scan_layers=False)(params)
    found, ours = loss_of(config, key, scan_layers=True, remat=remat)(params)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(slopes))
    # Sums in another order: four layers of experts round by some 2e-6 of the largest.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6 * largest), ours, slopes)


def test_a_scan_s_program_does_not_grow_with_the_layers():
    products = []
    for layers in (2, 6):
        config = tiny.config(n_layer=layers)
        params = jax.eval_shape(build(config).init, jax.random.key(0))
        text = loss_of(config, None, scan_layers=True).lower(params).as_text()
        products.append(text.count("stablehlo.dot_general"))
    assert products[0] == products[1] > 0
