"""Each loss by hand, their weights, and the balance loss over rows, microbatches and meshes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import BalanceScope, Loss
from moe_jax.kernels.cross_entropy import token_nll
from moe_jax.moe import counts
from moe_jax.moe.balance import balance_loss, cv_squared_plus_one
from moe_jax.training import losses
from tests.support.toys import set_up, toy_batch, toy_config


@pytest.mark.parametrize("experts", [4, 8, 64])
def test_the_squared_variation_of_even_values_is_zero(experts):
  even_ZE = jnp.full((1, experts), 0.3)
  np.testing.assert_allclose(cv_squared_plus_one(even_ZE), 1.0, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1.0, 1e18])
def test_the_squared_variation_of_any_values_is_finite(scale):
  """Of nothing it is 0. Also where XLA squares before it divides, as in some programs on meshes."""
  x_ZE = scale * jnp.array([[4.0, 0.0, 1.0, 1.0]])
  value, gradient = jax.value_and_grad(lambda x: cv_squared_plus_one(x)[0])(x_ZE)
  assert np.isfinite(value) and np.isfinite(gradient).all()
  if scale >= 1:
    np.testing.assert_allclose(value, 4 * 18 / 36, rtol=1e-6)
  if scale == 0:
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("name", ["load_balance", "router_z", "z", "importance", "load"])
def test_a_loss_of_weight_zero_is_logged_only(name):
  """It neither enters the total nor has a gradient, though here it is not finite."""
  stats = counts.zeros(1, 2, 1)._replace(
    tokens=jnp.array([4]),
    routed_E=jnp.array([[4, 0]]),
    prob_E=jnp.ones((1, 2)),
    z=jnp.ones(1),
    importance_E=jnp.ones((1, 2)),
    load_E=jnp.ones((1, 2)),
  )
  sums = losses.sums(jnp.ones((1, 4)), jnp.ones((1, 4)), jnp.ones((1, 4), bool), stats)
  source = {"load_balance": "prob_E", "router_z": "z", "importance": "importance_E"}
  source = source.get(name, "load_E")

  def total(x, weight):
    made = sums._replace(z=x) if name == "z" else sums._replace(moe=stats._replace(**{source: x}))
    others = Loss(**(dict(load_balance=0.1, router_z=0.1) | {name: weight}))
    all_losses = losses.total(made, others, 1)
    return all_losses.total, all_losses

  broken = jnp.full_like(sums.z if name == "z" else getattr(stats, source), jnp.inf)
  gradient, all_losses = jax.grad(total, has_aux=True)(broken, 0.0)
  assert np.isfinite(all_losses.total) and not gradient.any()
  assert not np.isfinite(getattr(all_losses, name))
  assert not np.isfinite(total(broken, 0.5)[0])


def test_a_lost_statistic_raises():
  stats = counts.zeros(1, 4, 1)
  sums = losses.sums(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1), bool), stats)
  with pytest.raises(ValueError, match="1 of 2 MoE layers"):
    losses.total(sums, Loss(), num_moe_layers=2)


class Rows(NamedTuple):
  together: losses.Sums
  one_by_one: losses.Sums  # as two microbatches


@pytest.fixture
def opposite_rows():
  """Two rows that prefer opposite experts: balanced together, unbalanced one by one."""
  routed = np.array([[4, 0], [0, 4]])
  prob = np.array([[3.0, 1.0], [1.0, 3.0]])
  stats = counts.zeros(1, 2, 1)._replace(
    tokens=jnp.array([8]),
    sequences=jnp.array([2]),
    routed_E=jnp.array(routed.sum(0))[None],
    prob_E=jnp.array(prob.sum(0))[None],
    sequence_balance=jnp.sum(balance_loss(jnp.array(routed), jnp.array(prob), jnp.full(2, 4)))[
      None
    ],
  )
  ones = jnp.ones((1, 1))
  together = losses.sums(ones, ones, ones > 0, stats)
  halves = [
    losses.sums(
      ones,
      ones,
      ones > 0,
      stats._replace(
        tokens=jnp.array([4]), routed_E=jnp.array(routed[i])[None], prob_E=jnp.array(prob[i])[None]
      ),
    )
    for i in range(2)
  ]
  return Rows(together, jax.tree.map(jnp.add, *halves))


@pytest.mark.preflight
@pytest.mark.parametrize(
  ("rows", "scope", "expected"),
  [
    ("together", BalanceScope.GLOBAL, 1.0),
    ("together", BalanceScope.SEQUENCE, 1.5),  # 2 * 1 * 3/4
    ("one_by_one", BalanceScope.MICROBATCH, 1.5),
    ("one_by_one", BalanceScope.GLOBAL, 1.0),
  ],
)
def test_the_balance_loss_of_a_scope(rows, scope, expected, opposite_rows):
  assert losses.load_balance(getattr(opposite_rows, rows), scope).tolist() == [expected]


@pytest.mark.slow
@pytest.mark.parametrize("scope", [BalanceScope.SEQUENCE, BalanceScope.MICROBATCH])
def test_scopes_do_not_depend_on_the_mesh(scope):
  values = []
  for axes, accumulation in (({}, 1), (dict(expert=4), 1), (dict(expert=2), 2)):
    config = toy_config(
      {"loss": Loss(load_balance=1.0, balance_scope=scope), "train.accumulation": accumulation}
    )
    mesh, state, step = set_up(config, axes)
    with jax.set_mesh(mesh):
      _, metrics = step(state, sharding.to_global(toy_batch(config), mesh))
    values.append((float(metrics["load_balance"]), float(metrics["grad_norm"])))
  np.testing.assert_allclose(values[1], values[0], rtol=1e-5)
  accumulated_alike = np.allclose(values[2], values[0], rtol=1e-4)
  assert accumulated_alike == (scope is not BalanceScope.MICROBATCH)


def test_cross_entropy_by_hand():
  logits_BLV = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05]]]))
  targets_BL = jnp.array([[0, 1, 2]])
  real_BL = jnp.array([[True, True, False]])
  no_experts = counts.zeros(0, 4, 1)
  sums = losses.sums(*token_nll(logits_BLV + 2.0, targets_BL), real_BL, no_experts)
  np.testing.assert_allclose(sums.nll, -np.log(0.5) - np.log(0.8), rtol=1e-6)
  np.testing.assert_allclose(sums.z, 2 * 2.0**2, rtol=1e-6)  # logsumexp of each is 2
  assert sums.targets == 2
  total = losses.total(sums, Loss(z=0.5), num_moe_layers=0)
  np.testing.assert_allclose(total.cross_entropy, sums.nll / 2, rtol=1e-6)
  np.testing.assert_allclose(total.total, sums.nll / 2 + 0.5 * 4, rtol=1e-6)


def test_weighted_losses_by_hand():
  """Losses of three targets and of two experts, of which one is chosen by all four tokens."""
  stats = counts.zeros(1, 2, 1)._replace(
    tokens=jnp.array([4]),
    routed_E=jnp.array([[4, 0]]),
    kept_E=jnp.array([[4, 0]]),
    prob_E=jnp.array([[3.0, 1.0]]),
    z=jnp.array([8.0]),
    importance_E=jnp.array([[3.0, 1.0]]),
  )
  uniform = losses.sums(jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.ones((1, 3), bool), stats)
  weights = Loss(load_balance=0.1, router_z=0.01, importance=0.2)
  found = losses.total(uniform._replace(nll=jnp.array(6.0)), weights, 1)
  assert float(found.load_balance) == pytest.approx(2 * (1 * 3 / 4))  # E * sum f P
  assert float(found.router_z) == pytest.approx(2.0)
  assert float(found.importance) == pytest.approx(1 + 1 / 4)  # mean 2, variance 1
  assert float(found.total) == pytest.approx(2.0 + 0.1 * 1.5 + 0.01 * 2.0 + 0.2 * 1.25)
