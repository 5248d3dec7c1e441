"""The metrics of a run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.moe.counts import MoeStats

DEAD_SHARE = 0.05  # an expert is dead if its load is below this part of the fair share, 1/E


def moe_metrics(moe: MoeStats) -> dict[str, jax.Array]:
  """Returns how evenly each MoE layer uses its experts, and what it drops.

  Args:
    moe: sums over the whole batch, jax or NumPy arrays; Z is the number of MoE layers.

  Returns:
    load_ZE: the share of the layer's assignments that goes to each expert, before drops.
    load_entropy_Z: the entropy of load_ZE in nats; log E if the loads are equal.
    max_vio_Z: the largest load over the mean load, minus 1 (2408.15664).
    dead_experts_Z: the number of experts with less than 5% of the mean load.
    router_entropy_Z: the mean entropy of a token's distribution over the experts, in nats.
    router_z_Z: the mean of logsumexp(router logits)^2.
    drop_fraction_Z: the share of the assignments that is dropped; drop_by_rank_ZK the share of the
      first choices, of the second, ...; drop_by_position_ZP the share in each eighth of a sequence.
    gate_drop_fraction_Z: the share of the gates' sum that is dropped.
    overflow_fraction_Z: the share of the assignments that did not fit in a buffer of the exchange;
      they count as dropped, too.
  """
  num_experts, ranks = moe.routed_E.shape[-1], moe.kept_K.shape[-1]
  routed_Z1 = jnp.maximum(jnp.sum(moe.routed_E, axis=-1, keepdims=True), 1)
  tokens_Z = jnp.maximum(moe.tokens, 1)
  load_ZE = moe.routed_E / routed_Z1
  gate_Z = jnp.maximum(jnp.sum(moe.importance_E, axis=-1), 1e-20)
  return {
    "load_ZE": load_ZE,
    "load_entropy_Z": -jnp.sum(jax.scipy.special.xlogy(load_ZE, load_ZE), axis=-1),
    "max_vio_Z": jnp.max(load_ZE, axis=-1) * num_experts - 1,
    "dead_experts_Z": count_dead(load_ZE),
    "router_entropy_Z": moe.entropy / tokens_Z,
    "router_z_Z": moe.z / tokens_Z,
    "drop_fraction_Z": 1 - jnp.sum(moe.kept_E, axis=-1) / routed_Z1[:, 0],
    "drop_by_rank_ZK": 1 - moe.kept_K * ranks / routed_Z1,
    "drop_by_position_ZP": 1 - moe.kept_P / jnp.maximum(moe.routed_P, 1),
    "gate_drop_fraction_Z": jnp.maximum(1 - moe.gate_kept / gate_Z, 0),  # -1e-8 by rounding
    "overflow_fraction_Z": moe.overflow / routed_Z1[:, 0],
  }


def count_dead(load_ZE: jax.Array) -> jax.Array:
  """Returns the number of experts of each layer below 5% of the mean load, int [Z]."""
  return jnp.sum(load_ZE * load_ZE.shape[-1] < DEAD_SHARE, axis=-1)


def device_overload(load_ZE: np.ndarray, expert_devices: int) -> np.ndarray:
  """Returns the largest over the mean number of assignments of a device, float [Z].

  Devices wait for the one with the most assignments. Drops are not subtracted.

  Args:
    load_ZE: shares of the assignments; each device holds the next E / expert_devices experts.
    expert_devices: the size of the mesh axis `expert`.
  """
  by_device_ZX = load_ZE.reshape(len(load_ZE), expert_devices, -1).sum(axis=-1)
  return by_device_ZX.max(axis=-1) * expert_devices


_GROUPS = {"embed": "embed", "head": "head"}


def parameter_group(name: str) -> str:
  """Returns embed, head, router, experts, attention, ffn, norm or bias for a parameter's name."""
  parameter = sharding.declared(name)
  if parameter is not None:
    return parameter.group
  prefix, letters = name.split("_")[0], name.rsplit("_", 1)[-1]
  if not sharding.is_matrix(name):
    return "bias" if "bias_" in name else "norm"
  kind = "experts" if letters[0] == "E" else "attention" if set(letters) & set("HGQUJO") else "ffn"
  return _GROUPS.get(prefix, kind)


def gradient_norms(grads: Any) -> dict[str, jax.Array]:
  """Returns {"grad_norm": of all, "grad_norm_experts": of one parameter_group, ...}, float32."""
  squares: dict[str, jax.Array] = {}
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    group = parameter_group(sharding.param_name(path))
    squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(grad))
  norms = {f"grad_norm_{group}": jnp.sqrt(square) for group, square in squares.items()}
  return {"grad_norm": jnp.sqrt(sum(squares.values()))} | norms
