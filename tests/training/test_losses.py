"""Each loss by hand, their weights, and the balance loss over rows, microbatches and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.config import BalanceScope
from moe_jax.moe import counts
from moe_jax.training import losses
from tests.support.toys import set_up, toy_batch, toy_config


def test_balance_loss_is_one_when_balanced_for_every_k():
  for experts, K in ((4, 1), (8, 2), (64, 8)):
    even = counts.balance(jnp.full((1, experts), K), jnp.ones((1, experts)), jnp.array([experts]))
    np.testing.assert_allclose(even, [1.0], rtol=1e-6)
    np.testing.assert_allclose(
      losses.cv_squared_plus_one(jnp.full((1, experts), 0.3)), 1.0, rtol=1e-6
    )
  routed_E, prob_E = jnp.zeros((1, 64), int).at[0, 0].set(8 * 64), jnp.zeros((1, 64))
  collapsed = counts.balance(routed_E, prob_E.at[0, 0].set(64.0), jnp.array([64]))
  np.testing.assert_allclose(collapsed, [64.0], rtol=1e-6)


def test_a_lost_statistic_raises():
  stats = counts.zeros(1, 4, 1)
  sums = losses.sums(jnp.zeros((1, 1, 3)), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool), stats)
  with pytest.raises(ValueError, match="1 of 2 MoE layers"):
    losses.total(sums, config_lib.Loss(), num_moe_layers=2)


@pytest.mark.preflight
def test_balance_scopes():
  """Two rows that prefer opposite experts: balanced together, unbalanced one by one."""
  routed = np.array([[4, 0], [0, 4]])
  prob = np.array([[3.0, 1.0], [1.0, 3.0]])
  stats = counts.zeros(1, 2, 1)._replace(
    tokens=jnp.array([8]), sequences=jnp.array([2]), routed_E=jnp.array(routed.sum(0))[None],
    prob_E=jnp.array(prob.sum(0))[None],
    sequence_balance=jnp.sum(counts.balance(jnp.array(routed), jnp.array(prob), jnp.full(2, 4)))
    [None],
  )  # fmt: skip
  ones = jnp.ones((1, 1))
  sums = losses.sums(ones[..., None], jnp.zeros((1, 1), int), ones > 0, stats)
  assert losses.load_balance(sums, BalanceScope.GLOBAL).tolist() == [1.0]
  assert losses.load_balance(sums, BalanceScope.SEQUENCE).tolist() == [1.5]  # 2 * 1 * 3/4
  halves = [
    losses.sums(ones[..., None], jnp.zeros((1, 1), int), ones > 0, stats._replace(
      tokens=jnp.array([4]), routed_E=jnp.array(routed[i])[None], prob_E=jnp.array(prob[i])[None]))
    for i in range(2)
  ]  # fmt: skip
  both = jax.tree.map(jnp.add, *halves)
  assert losses.load_balance(both, BalanceScope.MICROBATCH).tolist() == [1.5]
  assert losses.load_balance(both, BalanceScope.GLOBAL).tolist() == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize("scope", [BalanceScope.SEQUENCE, BalanceScope.MICROBATCH])
def test_scopes_do_not_depend_on_the_mesh(scope):
  values = []
  for axes, accumulation in (({}, 1), (dict(expert=4), 1), (dict(expert=2), 2)):
    config = toy_config()
    config.loss = config_lib.Loss(load_balance=1.0, balance_scope=scope)
    config.train.accumulation = accumulation
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
  sums = losses.sums(logits_BLV + 2.0, targets_BL, real_BL, no_experts)
  np.testing.assert_allclose(sums.nll, -np.log(0.5) - np.log(0.8), rtol=1e-6)
  np.testing.assert_allclose(sums.z, 2 * 2.0**2, rtol=1e-6)  # logsumexp of each is 2
  assert sums.targets == 2
  total = losses.total(sums, config_lib.Loss(z=0.5), num_moe_layers=0)
  np.testing.assert_allclose(total.cross_entropy, sums.nll / 2, rtol=1e-6)
  np.testing.assert_allclose(total.total, sums.nll / 2 + 0.5 * 4, rtol=1e-6)


def test_loss_weights_add_up():
  stats = counts.zeros(1, 2, 1)._replace(
    tokens=jnp.array([4]), routed_E=jnp.array([[4, 0]]), kept_E=jnp.array([[4, 0]]),
    prob_E=jnp.array([[3.0, 1.0]]), z=jnp.array([8.0]), importance_E=jnp.array([[3.0, 1.0]]),
  )  # fmt: skip
  uniform = losses.sums(jnp.zeros((1, 3, 2)), jnp.zeros((1, 3), int), jnp.ones((1, 3), bool), stats)
  sums = uniform._replace(nll=jnp.array(6.0))
  weights = config_lib.Loss(load_balance=0.1, router_z=0.01, importance=0.2)
  total = losses.total(sums, weights, 1)
  assert float(total.load_balance) == pytest.approx(2 * (1 * 3 / 4))  # E * sum f P
  assert float(total.router_z) == pytest.approx(2.0)
  assert float(total.importance) == pytest.approx(1 + 1 / 4)  # mean 2, variance 1
  assert float(total.total) == pytest.approx(2.0 + 0.1 * 1.5 + 0.01 * 2.0 + 0.2 * 1.25)
