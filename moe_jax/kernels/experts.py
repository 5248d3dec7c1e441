"""Computes a set of experts, each on its own rows, with the kernel that the config names.

Rows come in two layouts: slots [E, ..., D], equally many for every expert, or N rows sorted by
expert with the number of each expert's rows. Slots are one batched matmul on every platform. Sorted
rows need a choice of kernels, because no single one is fast everywhere: XLA's `ragged_dot` does E
times the arithmetic on a CPU and has no fast lowering on CUDA.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.config import GroupedMatmul
from moe_jax.kernels import blocked, per_expert, platform, tokamax_experts
from moe_jax.kernels.activation import Nonlinearity, gated
from moe_jax.kernels.autodiff import vary_alike
from moe_jax.kernels.expert_weights import Experts, with_grouped_matmul
from moe_jax.kernels.per_expert import PerExpert

ExpertWeights = Experts | PerExpert  # stacked for training, or packed for inference (packing.py)


def experts(
  x: jax.Array,
  sizes_E: jax.Array | None,
  weights: ExpertWeights,
  kernel: GroupedMatmul,
  activation: Nonlinearity = gated,
  gate: jax.Array | None = None,
) -> jax.Array:
  """Returns down(activation(gate(x), up(x))) of every row with its own expert's weights.

  Each of the three adds its bias, if the experts have biases.

  Args:
    x: slots [E, ..., D] if sizes_E is None; otherwise rows [N, D], of which the first sizes_E[0]
      belong to expert 0, the next sizes_E[1] to expert 1, and so on. Rows past sum(sizes_E) must be
      finite; their results are undefined and may be NaN, and no gradient flows through them.
    sizes_E: int32 number of each expert's rows, or None for slots.
    weights: of the E experts on this device, in the dtype of x; or packed for inference, in which
      case `kernel` is not read.
    kernel: for sorted rows; `auto` takes the platform's default, which nothing has measured.
    activation: (gate, up) -> h, or (up,) -> h of experts without a gate.
    gate: float32 [E, ...], multiplies the result of each slot; None for sorted rows.

  Returns:
    An array of the shape and dtype of x.
  """
  if isinstance(weights, PerExpert):
    assert sizes_E is not None, "inference sorts rows by expert"
    return per_expert.experts_one_by_one(x, weights, sizes_E, activation)
  if sizes_E is None:
    return _slots(x, weights, activation, gate)
  x, stacked, sizes_E = vary_alike((x, weights, sizes_E))
  if kernel is GroupedMatmul.AUTO:
    kernel = default(platform.name())
  return EXPERT_KERNELS[kernel].function(x, stacked, sizes_E, activation)


def _slots(
  x: jax.Array, weights: Experts, activation: Nonlinearity, gate: jax.Array | None
) -> jax.Array:
  def product(x: jax.Array, matrix: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = jnp.einsum("E...D,EDF->E...F", x, matrix)
    return y if bias is None else y + of_each(bias)

  def of_each(bias: jax.Array) -> jax.Array:
    return bias.reshape(bias.shape[0], *(1,) * (x.ndim - 2), -1)

  h = activation(*(product(x, matrix, bias) for matrix, bias in weights.gate_and_up))
  if gate is None:
    return product(h, weights.down_EFD, weights.down_bias_ED)
  gate = gate[..., None]
  y = product((h * gate).astype(h.dtype), weights.down_EFD, None)
  if weights.down_bias_ED is not None:
    y += (gate * of_each(weights.down_bias_ED)).astype(y.dtype)
  return y


def reference_experts(
  x_ND: jax.Array, weights: Experts, sizes_E: jax.Array, activation: Nonlinearity
) -> jax.Array:
  """Computes sorted rows with XLA's grouped matmul; every other kernel must give this answer.

  The arguments are those of `experts`.
  """
  return with_grouped_matmul(jax.lax.ragged_dot, x_ND, weights, sizes_E, activation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsKernel:
  """One way to compute the experts of sorted rows, forward and backward."""

  function: Callable[[jax.Array, Experts, jax.Array, Nonlinearity], jax.Array]
  platforms: tuple[str, ...]  # where the kernel runs
  tried_on: tuple[str, ...]  # where `auto` measures it
  available: Callable[[], str] = lambda: ""  # why it cannot run on the mesh in force; "" if it can


def _tokamax(implementation: str, *platforms: str) -> ExpertsKernel:
  return ExpertsKernel(
    function=tokamax_experts.implementation(implementation),
    platforms=platforms,
    tried_on=platforms,
    available=functools.partial(tokamax_experts.missing_tokamax, implementation),
  )


EXPERT_KERNELS: dict[GroupedMatmul, ExpertsKernel] = {
  GroupedMatmul.RAGGED_DOT: ExpertsKernel(
    function=reference_experts, platforms=("cpu", "tpu", "gpu"), tried_on=("tpu", "gpu")
  ),
  GroupedMatmul.BLOCKED: ExpertsKernel(
    function=blocked.blocked_experts, platforms=("cpu", "tpu", "gpu"), tried_on=("cpu",)
  ),
  GroupedMatmul.MOSAIC: _tokamax("mosaic", "tpu", "gpu"),
  GroupedMatmul.MOSAIC_TPU_V2: _tokamax("mosaic_tpu_v2", "tpu"),
  GroupedMatmul.TRITON: _tokamax("triton", "gpu"),
}


def default(platform: str) -> GroupedMatmul:
  """Returns the kernel that `auto` stands for if nothing has been measured."""
  return GroupedMatmul.BLOCKED if platform == "cpu" else GroupedMatmul.RAGGED_DOT
