"""Packs weights for inference in the layout that this device reads fastest.

On one CPU device a matrix is stored with its output dimensions first, and each expert is a separate
array; on all other meshes weights keep the layout of training. `linear` and `experts` take both.
"""

import jax

from moe_jax.kernels import output_first, per_expert, platform
from moe_jax.kernels.experts import Experts, ExpertWeights
from moe_jax.kernels.linear import Weight


def packs() -> bool:
  """Returns whether the mesh in force is one CPU device, for which the functions below pack."""
  return platform.one_cpu()


def matrix(weight: Weight, inner: int = 1) -> Weight:
  """Packs a weight [*inner, *outer] for `linear`, which sums over its `inner` first dimensions."""
  if not packs() or not isinstance(weight, jax.Array):
    return weight
  return output_first.pack_output_first(weight, inner)


def packed_experts(weights: ExpertWeights) -> ExpertWeights:
  """Packs stacked experts for `experts`; packed experts have no gradient."""
  if not packs() or not isinstance(weights, Experts):
    return weights
  return per_expert.pack_per_expert(weights)
