"""The MoE feed-forward on a mesh: route locally, all_to_all over `expert`, experts, and back.

The one file that names collective axes. On one device the same code runs and exchanges nothing, so
there is no second path to drift from this one. shard_map's replication check stays on: every
statistic is reduced over the mesh explicitly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax import config as config_lib
from moe_jax import dispatch, routers, sharding


class Experts(NamedTuple):
  """SwiGLU experts (2002.05202), compute dtype."""

  gate_EDF: jax.Array
  up_EDF: jax.Array
  down_EFD: jax.Array


class MoeStats(NamedTuple):
  """Sums over the real tokens of the whole mesh, so that they add up over microbatches too.

  A stack of layers has a leading Z on every field.
  """

  tokens: jax.Array  # int32 [], real tokens
  routed_E: jax.Array  # int32, assignments before capacity
  kept_E: jax.Array  # int32, assignments that found a slot
  prob_E: jax.Array  # float32, router probability; differentiable
  z: jax.Array  # float32 [], logsumexp(logits)^2; differentiable
  entropy: jax.Array  # float32 [], nats


def moe_ffn(
  x_BLD: jax.Array,
  logits_BLE: jax.Array,
  real_BL: jax.Array,
  experts: Experts,
  moe: config_lib.MoE,
  *,
  train: bool,
) -> tuple[jax.Array, MoeStats]:
  """Routes tokens to experts and combines their outputs, on the mesh in force.

  Args:
    x_BLD: tokens, compute dtype.
    logits_BLE: router logits, float32.
    real_BL: False at padding, which is routed nowhere and counted nowhere.
    experts: weights, sharded over `expert` and `tensor` (an fsdp shard is gathered on entry).
    moe: router, dispatcher, capacity and group size.
    train: picks the capacity factor.

  Returns:
    y_BLD, zero at padding and at tokens that lost all their assignments; global statistics.
  """
  batch, tensor = sharding.BATCH_AXES, "tensor"
  y_BLD, stats = jax.shard_map(
    lambda *arrays: _local_moe(*arrays, moe=moe, train=train),
    in_specs=(
      PartitionSpec(batch),
      PartitionSpec(batch),
      PartitionSpec(batch),
      Experts(
        PartitionSpec("expert", None, tensor),
        PartitionSpec("expert", None, tensor),
        PartitionSpec("expert", tensor, None),
      ),
    ),
    out_specs=(PartitionSpec(batch), PartitionSpec()),
  )(x_BLD, logits_BLE, real_BL, experts)
  return y_BLD, stats


def _local_moe(x_BLD, logits_BLE, real_BL, experts, *, moe, train):
  B, L, D = x_BLD.shape
  E, T = moe.num_experts, moe.group_size or L
  C = dispatch.capacity(moe.capacity_factor if train else moe.eval_capacity_factor, T, moe.top_k, E)
  x_MTD = x_BLD.reshape(-1, T, D)
  logits_MTE = logits_BLE.reshape(-1, T, E)
  real_MT = real_BL.reshape(-1, T)
  dispatcher = dispatch.DISPATCHERS[moe.dispatch]

  with jax.named_scope("route"):
    router = routers.ROUTERS[moe.router]
    routing = jax.vmap(lambda logits, real: router(logits, real, moe))(logits_MTE, real_MT)
    slots = jax.vmap(lambda routing: dispatch.assign_slots(routing, E, C))(routing)
  with jax.named_scope("dispatch"):
    pack = jax.vmap(lambda *args: dispatcher.pack(*args, E, C), out_axes=1)
    x_EMCD = pack(x_MTD, routing, slots)
    M = x_EMCD.shape[1]
    x_ERD = _to_experts(x_EMCD.reshape(E, M * C, D))
  with jax.named_scope("experts"):
    y_ERD = _swiglu(x_ERD, experts)
  with jax.named_scope("combine"):
    y_EMCD = _from_experts(y_ERD).reshape(E, M, C, D)
    combine = jax.vmap(lambda *args: dispatcher.combine(*args, T), in_axes=(1, 0, 0))
    # Each `tensor` device holds a part of F, so a partial sum; y is smaller than the slots.
    y_BLD = jax.lax.psum(combine(y_EMCD, routing, slots), "tensor").reshape(B, L, D)
  with jax.named_scope("statistics"):
    stats = jax.lax.psum(_stats(logits_MTE, real_MT, routing, slots), sharding.BATCH_AXES)
  return y_BLD, stats


def _to_experts(x_ERD):
  """[E, rows of this device, D] -> [E of this device, rows of all devices of the axis, D]."""
  if jax.lax.axis_size("expert") == 1:
    return x_ERD
  return jax.lax.all_to_all(x_ERD, "expert", split_axis=0, concat_axis=1, tiled=True)


def _from_experts(y_ERD):
  if jax.lax.axis_size("expert") == 1:
    return y_ERD
  return jax.lax.all_to_all(y_ERD, "expert", split_axis=1, concat_axis=0, tiled=True)


def _swiglu(x_ERD, experts):
  gate_ERF = jnp.einsum("ERD,EDF->ERF", x_ERD, experts.gate_EDF)
  up_ERF = jnp.einsum("ERD,EDF->ERF", x_ERD, experts.up_EDF)
  return jnp.einsum("ERF,EFD->ERD", jax.nn.silu(gate_ERF) * up_ERF, experts.down_EFD)


def _stats(logits_MTE, real_MT, routing, slots) -> MoeStats:
  real_MT1 = real_MT[..., None]
  to_expert_MNE = jax.nn.one_hot(routing.expert_N, logits_MTE.shape[-1], dtype=jnp.int32)

  def count(mask_MN):
    return jnp.sum(to_expert_MNE * mask_MN[..., None].astype(jnp.int32), axis=(0, 1))

  probs_MTE = routing.probs_TE
  entropy_MT = -jnp.sum(jax.scipy.special.xlogy(probs_MTE, probs_MTE), axis=-1)
  z_MT = jax.nn.logsumexp(logits_MTE, axis=-1) ** 2
  return MoeStats(
    tokens=jnp.sum(real_MT, dtype=jnp.int32),
    routed_E=count(routing.real_N),
    kept_E=count(slots.kept_N),
    prob_E=jnp.sum(jnp.where(real_MT1, probs_MTE, 0), axis=(0, 1)),
    z=jnp.sum(jnp.where(real_MT, z_MT, 0)),
    entropy=jnp.sum(jnp.where(real_MT, jax.lax.stop_gradient(entropy_MT), 0)),
  )
