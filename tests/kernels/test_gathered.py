"""Weights that the mesh splits: products and gradients are those of the whole weight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import GradientSums
from moe_jax.kernels import gathered
from moe_jax.kernels.linear import linear
from tests.support.toys import mesh_of

V, D, F, H, A, B, L = 10, 16, 6, 2, 3, 8, 5
WEIGHTS = {"embed_VD": (V, D), "up_DF": (D, F), "down_FD": (F, D), "q_DHA": (D, H, A),
           "out_HAD": (H, A, D), "q_up_QHA": (D, H, A), "norm_D": (D,)}  # fmt: skip
MESHES = [
  dict(data=2, fsdp=2, expert=2),
  dict(fsdp=8),
  dict(expert=8),
  dict(fsdp=2, expert=2, tensor=2),
  dict(data=2, fsdp=4),
]


def loss(weights, ids_BL, copies):
  """Depends on every weight in another way; `copies` is what happens to them before."""
  w = copies(weights)
  x_BLD = w["embed_VD"][ids_BL] * w["norm_D"].reshape(1, 1, -1)
  y_BLD = linear(jnp.sin(linear(x_BLD, w["up_DF"])), w["down_FD"])
  z_BLHA = linear(y_BLD, w["q_DHA"]) * linear(x_BLD, w["q_up_QHA"])
  logits_BLV = linear(linear(z_BLHA, w["out_HAD"], inner=2), w["embed_VD"].T)
  return jnp.sum(jnp.sin(logits_BLV)), logits_BLV


@pytest.mark.parametrize("most", [32, 2], ids=["one gather", "two stages"])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_values_and_gradients_are_those_of_whole_weights(axes, most, monkeypatch):
  monkeypatch.setattr(gathered, "_MOST", most)
  rng = np.random.default_rng(0)
  weights = {n: rng.normal(size=s).astype(np.float32) * 0.3 for n, s in WEIGHTS.items()}
  ids_BL = rng.integers(0, V, (B, L))
  (_, expected), gradients = jax.value_and_grad(loss, has_aux=True)(weights, ids_BL, lambda w: w)
  mesh = mesh_of(**axes)
  with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(lambda w, i: loss(w, i, gathered.copies), has_aux=True))
    placed = jax.device_put(weights, sharding.param_shardings(weights, mesh))
    (_, logits_BLV), found = step(placed, sharding.place(ids_BL, mesh))
    copied = jax.eval_shape(gathered.copies, weights)
  split = {name for name, weight in copied.items() if isinstance(weight, gathered.Copies)}
  assert split == set(WEIGHTS) - {"norm_D"}  # the matrices, along D or along a latent
  np.testing.assert_allclose(logits_BLV, expected, rtol=1e-4, atol=1e-5)
  for name in WEIGHTS:  # sums of float32 in another order
    np.testing.assert_allclose(found[name], gradients[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=4), dict(fsdp=2, expert=2, data=2)], ids=str)
def test_gradients_can_be_added_up_in_float32(axes, monkeypatch):
  """Of a bfloat16 matrix: scattered, summed over `data`, and the gradient of one device."""
  monkeypatch.setattr(gathered, "_MOST", 2)  # in stages, too
  rng = np.random.default_rng(0)
  w_DF, x_BLD = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((D, F), (B, L, D)))

  def loss(w_DF, x_BLD, sums):
    w_DF = gathered.copies({"up_DF": w_DF}, sums)["up_DF"]
    return jnp.sum(jnp.sin(linear(x_BLD, w_DF).astype(jnp.float32)))

  expected = jax.grad(loss)(w_DF, x_BLD, GradientSums.COMPUTE).astype(jnp.float32)
  with jax.set_mesh(mesh_of(**axes)):
    placed = sharding.constrain(jnp.asarray(x_BLD), "BLD")
    for sums, kind in ((GradientSums.COMPUTE, "bf16"), (GradientSums.FLOAT32, "f32")):
      step = jax.jit(jax.grad(loss), static_argnums=2)
      text = step.lower(w_DF, placed, sums).as_text()
      ends = re.findall(r"(?:reduce_scatter|all_reduce).*?->\s*tensor<[\dx]*x(\w+)>", text, re.S)
      assert len(ends) >= 2 and set(ends) == {kind}
      found = step(w_DF, placed, sums).astype(jnp.float32)
      # bfloat16 keeps 8 bits of each device's part
      np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.05)


def test_a_mesh_that_splits_no_weight_copies_none():
  weights = {"up_DF": jnp.ones((D, F))}
  with jax.set_mesh(mesh_of(data=4, tensor=2)):
    assert gathered.copies(weights) is weights
  assert gathered.copies(weights) is weights


def test_a_large_axis_is_gathered_in_two_stages_of_neighbours_and_strides():
  assert gathered._stages(1) == [] and gathered._stages(32) == [None]
  near, far = gathered._stages(64)
  assert near[1] == list(range(8, 16)) and far[1] == list(range(1, 64, 8))
