"""The mixture of experts against every expert meeting every row, values and gradients; its balance; its loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import core
import tiny
import tiny_gpt_oss
from core import losses, moe
from core.quant import MXFP4

E, C, D, F = 7, 3, 32, 64
SETTINGS: dict[str, Any] = {"alpha": 1.702, "limit": 0.5}


@functools.cache
def a_case(rows: int, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Rows, router logits, choices, experts. Most rows want expert 5, nobody wants 2: several tiles, and none."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * scale, dtype)

    kernels = normal(E, D, F, 2, scale=0.2), normal(E, F, D, scale=0.2)
    experts = moe.Experts(kernels[0], normal(E, F, 2), kernels[1], normal(E, D))
    logits_RE = normal(rows, E).astype(jnp.float32).at[:, 5].add(3).at[:, 2].add(-20)
    return normal(rows, D), logits_RE, moe.route(logits_RE, C)[1], experts


def packed(experts: moe.Experts) -> tuple[moe.Experts, moe.Experts]:
    """Experts in MXFP4, and the same dense."""
    rng = np.random.default_rng(1)

    def random(*shape: int) -> MXFP4:
        blocks = rng.integers(0, 256, (*shape, 16), np.uint8)
        scales = rng.integers(122, 126, shape, np.uint8)
        return MXFP4(jnp.asarray(blocks), jnp.asarray(scales))

    gate_up, down = random(E, F, 2, D // 32), random(E, D, F // 32)
    narrow = experts._replace(gate_up_EDF2=gate_up, down_EFD=down)
    decode = jax.jit(lambda kernel: jnp.moveaxis(kernel.decode(jnp.float32), -1, 1))
    wide = experts._replace(gate_up_EDF2=decode(gate_up), down_EFD=decode(down))
    return narrow, wide


def mixed(x_RD: jax.Array, logits_RE: jax.Array, experts: Any, **form: Any) -> jax.Array:
    return moe.mix(x_RD, *moe.route(logits_RE, C), experts, **SETTINGS, **form)


def halves(
    x_RD: jax.Array, logits_RE: jax.Array, experts: Any, *, ragged: bool = False
) -> jax.Array:
    """As two devices with half of the experts each."""
    weights_RC, chosen_RC = moe.route(logits_RE, C)
    form = functools.partial(moe._mix_of, tile=8, ragged=ragged, **SETTINGS)
    low, high = (jax.tree.map(lambda x, i=i: jnp.split(x, [3])[i], experts) for i in (0, 1))
    return form(x_RD, weights_RC, chosen_RC, low) + form(x_RD, weights_RC, chosen_RC - 3, high)


def every_expert_meets_every_row(x_RD: jax.Array, logits_RE: jax.Array, experts: Any) -> jax.Array:
    weights_RC, chosen_RC = moe.route(logits_RE, C)
    weights_RE = (jax.nn.one_hot(chosen_RC, E) * weights_RC[..., None]).sum(1)
    h_ERF2 = jnp.einsum("RD,EDFt->ERFt", x_RD, experts.gate_up_EDF2)
    h_ERF2 = h_ERF2 + experts.gate_up_bias_EF2[:, None]
    y_ERD = jnp.einsum("ERF,EFD->ERD", moe.swiglu(h_ERF2, **SETTINGS), experts.down_EFD)
    return jnp.einsum("ERD,RE->RD", y_ERD + experts.down_bias_ED[:, None], weights_RE)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(form: Any, *arguments: Any) -> Any:
    """The rows, and the gradients of a sum that no two numbers of theirs enter alike."""

    def total(x_RD: jax.Array, logits_RE: jax.Array, experts: Any) -> tuple[jax.Array, jax.Array]:
        y_RD = form(x_RD, logits_RE, experts)
        return (jnp.sin(y_RD) * jnp.arange(1.0, y_RD.size + 1).reshape(y_RD.shape)).mean(), y_RD

    (_, y_RD), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*arguments)
    return y_RD, gradients


def in_both_forms(form: Any, more: Any = ()) -> pytest.MarkDecorator:
    """The experts' products as tiles and ragged; each a function that all tests share, and so compile once."""
    ragged = functools.partial(form, ragged=True)
    forms = [form, pytest.param(ragged, marks=more)]
    return pytest.mark.parametrize("form", forms, ids=["tiles", "ragged"])


def assert_close(found: Any, expected: Any, atol: float = 2e-5) -> None:
    """Within `atol` of each array's largest number."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        largest = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a / largest, b / largest, atol=atol)


@in_both_forms(mixed)
@pytest.mark.parametrize(
    "rows",
    [*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 5, 40)), 300],
)
def test_rows_and_all_gradients_are_those_of_every_expert_meeting_every_row(rows: int, form: Any):
    x_RD, logits_RE, chosen_RC, experts = a_case(rows)
    assert not (chosen_RC == 2).any()
    found = value_and_gradients(form, x_RD, logits_RE, experts)
    expected = value_and_gradients(every_expert_meets_every_row, x_RD, logits_RE, experts)
    assert_close(found, expected)
    assert not found[1][2].gate_up_EDF2[2].any()


@in_both_forms(halves, pytest.mark.slow)
def test_experts_in_two_halves_give_two_sums(form: Any):
    """A row of neither's experts gives nothing, and has no gradient."""
    x_RD, logits_RE, _, experts = a_case(40)
    found = value_and_gradients(form, x_RD, logits_RE, experts)
    assert_close(found, value_and_gradients(every_expert_meets_every_row, x_RD, logits_RE, experts))


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 40])
def test_packed_experts_pass_the_gradient_on_to_rows_router_and_biases(rows: int):
    x_RD, logits_RE, _, experts = a_case(rows)
    narrow, wide = packed(experts)

    def of(form: Any, kernels: moe.Experts, x_RD: jax.Array, logits_RE: jax.Array, biases: Any):
        return form(x_RD, logits_RE, kernels._replace(**biases))

    biases = {f: getattr(experts, f) for f in ("gate_up_bias_EF2", "down_bias_ED")}
    found, expected = (
        value_and_gradients(functools.partial(of, form, kernels), x_RD, logits_RE, biases)
        for form, kernels in ((mixed, narrow), (every_expert_meets_every_row, wide))
    )
    assert_close(found, expected)


@pytest.mark.slow
def test_a_step_that_computes_it_again_and_scans_has_the_same_gradients():
    x_RD, logits_RE, _, experts = a_case(40)

    def twice(form: Any, x_RD: jax.Array, logits_RE: jax.Array, experts: Any) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x + form(x, logits_RE, experts), None), x_RD, length=2)[0]

    found, expected = (
        value_and_gradients(functools.partial(twice, form), x_RD, logits_RE, experts)
        for form in (jax.checkpoint(mixed), mixed)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_row_that_is_no_number_spoils_no_other_row():
    x_RD, logits_RE, _, experts = a_case(40)
    broken_RD = x_RD.at[11].set(jnp.nan)
    both = functools.partial(value_and_gradients, mixed)
    found_RD, gradients = both(broken_RD, logits_RE, experts)
    others = np.arange(40) != 11
    np.testing.assert_array_equal(found_RD[others], both(x_RD, logits_RE, experts)[0][others])
    assert np.isfinite(gradients[0][others]).all()
    spared = [e for e in range(E) if e not in moe.route(logits_RE, C)[1][11]]
    assert np.isfinite(np.asarray(gradients[2].gate_up_EDF2)[spared]).all()
    assert np.isnan(found_RD[11]).all()


def test_a_row_s_numbers_do_not_depend_on_where_the_others_go():
    x_RD, logits_RE, _, experts = a_case(40)
    moved_RE = jnp.roll(logits_RE.at[1:].multiply(-1), 1, axis=-1).at[0].set(logits_RE[0])
    mix = jax.jit(mixed)
    found, expected = (mix(x_RD, x, experts) for x in (moved_RE, logits_RE))
    np.testing.assert_array_equal(found[0], expected[0])


@in_both_forms(mixed, pytest.mark.slow)
def test_bfloat16_gradients_are_near_those_of_float32(form: Any):
    narrow = a_case(40, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    found, expected = (
        value_and_gradients(form, x_RD, logits_RE, experts)
        for x_RD, logits_RE, _, experts in (narrow, wide)
    )
    assert found[1][2].down_EFD.dtype == jnp.bfloat16
    as_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), found)
    assert_close(as_float32, expected, atol=0.05)


def test_load_balance_is_the_paper_s_over_all_layers_together():
    rng = np.random.default_rng(0)
    routers = [rng.standard_normal((rows, E)).astype(np.float32) * 3 for rows in (11, 11, 11)]
    logits = np.concatenate(routers).astype(np.float64)
    share, mean = np.zeros(E), np.zeros(E)
    for row in logits:
        share[np.argsort(row)[-C:]] += 1 / len(logits)
        mean += np.exp(row) / np.exp(row).sum() / len(logits)
    load_balance = jax.jit(moe.load_balance, static_argnums=1)
    found = load_balance([jnp.asarray(x) for x in routers], C)
    np.testing.assert_allclose(found, E * (share * mean).sum(), rtol=1e-6)
    apart = np.mean([load_balance([jnp.asarray(x)], C) for x in routers])
    assert abs(apart - found) > 1e-3
    assert load_balance([jnp.zeros((5, E))], E) == pytest.approx(E)


@pytest.mark.parity
def test_load_balance_and_its_gradient_are_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    rng = np.random.default_rng(0)
    routers = [rng.standard_normal((30, E)).astype(np.float32) * 3 for _ in range(4)]
    expected = [torch.tensor(x, requires_grad=True) for x in routers]
    total = theirs.load_balancing_loss_func(tuple(expected), E, C)
    total.backward()
    found, gradients = jax.value_and_grad(functools.partial(moe.load_balance, count=C))(routers)
    np.testing.assert_allclose(found, total.item(), rtol=1e-6)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b.grad.numpy(), rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_a_loss_adds_the_balance_and_can_leave_it_out():
    config = tiny_gpt_oss.config(router_aux_loss_coef=0.3)
    model, params = core.build(config), tiny_gpt_oss.params(tiny_gpt_oss.weights(config))
    ids = tiny.tokens(config, 2, 2, 9)
    batch = core.Batch(ids[0], ids[1].at[0].set(-1))

    @jax.jit
    def everything(params: Any) -> Any:
        with_balance = jax.value_and_grad(core.loss)(params, model, batch)
        without = jax.value_and_grad(functools.partial(core.loss, auxiliary=False))
        routed = model.apply_and_route(params, batch.inputs_BT)
        return (
            losses.terms(params, model, batch),
            with_balance,
            without(params, model, batch),
            routed,
        )

    parts, (whole, gradients), (entropy, without), (logits_BTV, routers) = everything(params)
    assert [x.shape for x in routers] == [(18, E)] * 3
    assert entropy == pytest.approx(float(losses.cross_entropy(logits_BTV, batch.targets_BT)))
    assert entropy == parts.cross_entropy
    assert parts.load_balance == pytest.approx(float(moe.load_balance(routers, C)))
    assert whole == pytest.approx(float(entropy) + 0.3 * float(parts.load_balance))
    kernel_DE, without_DE = (
        x["blocks"]["1"]["moe"]["router"]["kernel"] for x in (gradients, without)
    )
    assert jnp.abs(kernel_DE - without_DE).max() > 1e-4


def test_the_loss_of_a_model_without_experts_is_its_cross_entropy_and_nothing_more(model, params):
    ids = tiny.tokens(model.config, 2, 3, 11)
    batch = core.Batch(*ids)

    logits_BTV = jax.jit(model.apply)(params, batch.inputs_BT)
    found = jax.jit(core.loss, static_argnums=1)(params, model, batch)
    np.testing.assert_allclose(found, losses.cross_entropy(logits_BTV, batch.targets_BT), rtol=1e-6)
    terms = jax.eval_shape(lambda params: losses.terms(params, model, batch), params)
    assert terms.load_balance is None
