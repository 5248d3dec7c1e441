"""The product with its own gradient is the plain one, and remat keeps it as it keeps others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Remat
from moe_jax.kernels.linear import linear
from moe_jax.kernels.matmul import matmul
from moe_jax.model.transformer import REMAT_POLICIES


def both(function, x, w, dy):
  y, vjp = jax.vjp(function, x, w)
  return (y, *vjp(dy.astype(y.dtype)))


@pytest.mark.parametrize("dtype", [None, jnp.dtype(jnp.float32)], ids=str)
@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(40, 24, 56), (40, 56, 24), (1, 8, 8)], ids=str)
def test_values_and_gradients_are_those_of_dot(sizes, kind, dtype):
  R, I, O = sizes  # noqa: E741 (the letters of the module)
  rng = np.random.default_rng(0)
  x, w, dy = (jnp.asarray(rng.normal(size=s), kind) for s in ((R, I), (I, O), (R, O)))
  got = both(lambda x, w: matmul(x, w, dtype), x, w, dy)
  want = both(lambda x, w: jnp.dot(x, w, preferred_element_type=dtype), x, w, dy)
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    limit = 1e-5 if kind is jnp.float32 else 2e-2
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=limit, atol=limit)


def test_remat_that_keeps_matmuls_keeps_these(one_device):
  """Forward, and the gradients of both arguments: three products of each, and no fourth."""
  x, w = jnp.ones((8, 16)), jnp.ones((16, 32))

  def loss(x, w, policy):
    layer = jax.checkpoint(lambda x, w: jnp.sin(linear(jnp.sin(x), w)), policy=policy)
    return jnp.sum(layer(x, w))

  def products(remat):
    step = jax.grad(loss, argnums=(0, 1))
    text = str(jax.make_jaxpr(lambda x, w: step(x, w, REMAT_POLICIES[remat]))(x, w))
    return text.count("dot_general[")

  assert products(Remat.DOTS) == 3 and products(Remat.FULL) == 4
