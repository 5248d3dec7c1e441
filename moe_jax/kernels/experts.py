"""A set of experts on the rows that are theirs; which kernel computes it is a config field.

Rows come in two layouts: slots [E, R, D], as many for every expert, and N rows sorted by expert
with the number of each expert's rows. Slots are one batched matmul on every platform. Sorted rows
need a kernel, because no single one is fast everywhere: XLA's `ragged_dot` does E times the
arithmetic on a CPU and has no fast lowering on CUDA.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import GroupedMatmul
from moe_jax.kernels import blocked, per_expert, platform, tokamax_experts
from moe_jax.kernels.activation import Activation, gated
from moe_jax.kernels.autodiff import vary_alike
from moe_jax.kernels.per_expert import PerExpert


class Experts(NamedTuple):
  """Gated feed-forwards (SwiGLU, 2002.05202), stacked; compute dtype."""

  gate_EDF: jax.Array
  up_EDF: jax.Array
  down_EFD: jax.Array


ExpertWeights = Experts | PerExpert  # as they are trained, or packed for inference (packing.py)


def experts(
  x: jax.Array,
  sizes_E: jax.Array | None,
  weights: ExpertWeights,
  kernel: GroupedMatmul,
  activation: Activation = gated,
) -> jax.Array:
  """down(activation(gate(x), up(x))) of every row with its own expert's weights, of the shape of x.

  Args:
    x: slots [E, R, D] where sizes_E is None; otherwise rows [N, D], the first sizes_E[0] of which
      are of expert 0, the next sizes_E[1] of expert 1, and so on. Rows past sum(sizes_E) must be
      finite; they come out undefined, NaN included, and take and give no gradient.
    sizes_E: int32, or None.
    weights: of the dtype of x; or packed for inference (`pack`), whatever the kernel.
    kernel: for sorted rows; `auto` is the platform's default (kernels/choose.py measures).
    activation: (gate, up) -> h.
  """
  if isinstance(weights, PerExpert):
    assert sizes_E is not None, "inference sorts rows by expert"
    return per_expert.experts(x, weights, sizes_E, activation)
  if sizes_E is None:
    return _slots(x, weights, activation)
  x, gate_EDF, up_EDF, down_EFD, sizes_E = vary_alike(x, *weights, sizes_E)
  if kernel is GroupedMatmul.AUTO:
    kernel = default(platform.name())
  return KERNELS[kernel].function(x, (gate_EDF, up_EDF, down_EFD), sizes_E, activation)


def _slots(x_ERD: jax.Array, weights: Experts, activation: Activation) -> jax.Array:
  gate_ERF = jnp.einsum("ERD,EDF->ERF", x_ERD, weights.gate_EDF)
  up_ERF = jnp.einsum("ERD,EDF->ERF", x_ERD, weights.up_EDF)
  return jnp.einsum("ERF,EFD->ERD", activation(gate_ERF, up_ERF), weights.down_EFD)


Matrices = tuple[jax.Array, jax.Array, jax.Array]  # gate_EDF, up_EDF, down_EFD


def reference(
  x_ND: jax.Array, weights: Matrices, sizes_E: jax.Array, activation: Activation
) -> jax.Array:
  """Three grouped matmuls of XLA's own: the answer that every other kernel must give."""
  gate_EDF, up_EDF, down_EFD = weights
  gate_NF = jax.lax.ragged_dot(x_ND, gate_EDF, sizes_E)
  up_NF = jax.lax.ragged_dot(x_ND, up_EDF, sizes_E)
  return jax.lax.ragged_dot(activation(gate_NF, up_NF), down_EFD, sizes_E)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsKernel:
  """What computes the experts of sorted rows, forward and backward."""

  function: Callable[[jax.Array, Matrices, jax.Array, Activation], jax.Array]
  platforms: tuple[str, ...]  # where it runs
  tried_on: tuple[str, ...]  # where `auto` considers it
  available: Callable[[], str] = lambda: ""  # why it cannot run on the mesh in force, or ""


def _tokamax(implementation: str, *platforms: str) -> ExpertsKernel:
  return ExpertsKernel(
    function=tokamax_experts.implementation(implementation),
    platforms=platforms,
    tried_on=platforms,
    available=functools.partial(tokamax_experts.missing, implementation),
  )


KERNELS: dict[GroupedMatmul, ExpertsKernel] = {
  GroupedMatmul.RAGGED_DOT: ExpertsKernel(
    function=reference, platforms=("cpu", "tpu", "gpu"), tried_on=("tpu", "gpu")
  ),
  GroupedMatmul.BLOCKED: ExpertsKernel(
    function=blocked.experts, platforms=("cpu", "tpu", "gpu"), tried_on=("cpu",)
  ),
  GroupedMatmul.MOSAIC: _tokamax("mosaic", "tpu", "gpu"),
  GroupedMatmul.MOSAIC_TPU_V2: _tokamax("mosaic_tpu_v2", "tpu"),
  GroupedMatmul.TRITON: _tokamax("triton", "gpu"),
}


def default(platform: str) -> GroupedMatmul:
  """What `auto` is where nothing has been measured."""
  return GroupedMatmul.BLOCKED if platform == "cpu" else GroupedMatmul.RAGGED_DOT
