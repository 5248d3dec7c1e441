"""The balance of counts by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.balance import balance_loss


@pytest.mark.parametrize(("experts", "K"), [(4, 1), (8, 2), (64, 8)])
def test_the_balance_of_even_loads_is_one_for_every_k(experts, K):
  even = balance_loss(jnp.full((1, experts), K), jnp.ones((1, experts)), jnp.array([experts]))
  np.testing.assert_allclose(even, [1.0], rtol=1e-6)


def test_the_balance_is_the_number_of_experts_when_one_takes_all():
  routed_E, prob_E = jnp.zeros((1, 64), int).at[0, 0].set(8 * 64), jnp.zeros((1, 64))
  collapsed = balance_loss(routed_E, prob_E.at[0, 0].set(64.0), jnp.array([64]))
  np.testing.assert_allclose(collapsed, [64.0], rtol=1e-6)
