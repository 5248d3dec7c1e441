"""Cross entropy in chunks of tokens: the loss and the gradients of all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import Model, override
from moe_jax.kernels import cross_entropy, gathered
from moe_jax.kernels.linear import linear
from moe_jax.model import transformer
from tests.support.toys import gradients, lower_step, mesh_of, set_up, toy_batch, toy_config

B, L, D, V = 8, 6, 16, 24
SCALING = functools.partial(
  transformer.scaled_logits, model=Model(logit_soft_cap=1.5, logit_multiplier=0.7)
)


def close(found, expected):
  for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    # float32 sums in another order
    np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6 * np.abs(e).max())


def total(x_BLD, weights, targets_BL, chunk):
  """Every token counts otherwise; the square is a z-loss."""
  weights = gathered.copies(weights)
  head_DV = weights["embed_VD"].T if "embed_VD" in weights else weights["head_DV"]
  if chunk:
    nll_BL, log_z_BL = cross_entropy.nll_in_chunks(x_BLD, head_DV, targets_BL, chunk, SCALING)
  else:
    logits_BLV = sharding.constrain(SCALING(linear(x_BLD, head_DV)), "BLV")
    nll_BL, log_z_BL = cross_entropy.token_nll(logits_BLV, targets_BL)
  weight_BL = jnp.arange(B * L).reshape(B, L) / (B * L)
  return jnp.sum(weight_BL * (nll_BL + 0.1 * log_z_BL**2))


@pytest.mark.parametrize("chunk", [1, 5, 48])  # one token, no divisor of a device's tokens, all
@pytest.mark.parametrize("head", ["embed_VD", "head_DV"])
@pytest.mark.parametrize(
  "axes",
  [{}, {"data": 4, "tensor": 2}, {"fsdp": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}],
  ids=str,
)
def test_chunks_equal_all_logits(axes, head, chunk):
  random = np.random.default_rng(0)
  x_BLD = jnp.asarray(random.normal(size=(B, L, D)), jnp.float32)
  shape = (V, D) if head == "embed_VD" else (D, V)
  weights = {head: jnp.asarray(random.normal(size=shape), jnp.float32)}
  targets_BL = jnp.asarray(random.integers(0, V, (B, L)), jnp.int32)
  both = jax.value_and_grad(total, (0, 1))
  with jax.set_mesh(mesh_of(**axes)):
    step = jax.jit(both, static_argnums=3)
    close(step(x_BLD, weights, targets_BL, chunk), step(x_BLD, weights, targets_BL, 0))


def test_a_step_has_the_gradients_of_all_logits():
  """With microbatches, padding and a z-loss."""
  whole = toy_config({"loss.z": 0.01, "train.accumulation": 2, "model.moe.num_experts": 0})
  mesh, state, _ = set_up(whole, {"data": 2, "fsdp": 2})
  some, batch = override(whole, {"model.loss_chunk": 4}), toy_batch(whole)
  with jax.set_mesh(mesh):
    step = jax.jit(gradients, static_argnums=2)
    close(step(state, batch, some), step(state, batch, whole))


def test_logits_are_not_in_memory_at_once():
  fields = {"model.vocab_size": 30_000, "data.seq_len": 64, "model.moe.num_experts": 0}
  sizes = [
    lower_step(toy_config(fields | {"model.loss_chunk": chunk}))
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for chunk in (0, 64)
  ]
  logits = 4 * 8 * 64 * 30_000
  assert sizes[0] > logits and sizes[1] < sizes[0] - 0.8 * logits
