"""Weights as this device reads them fastest, when a model is loaded for inference.

On one CPU device a matrix lies with its output first and each expert is an array of its own;
everywhere else weights stay as they are trained. `linear` and `experts` take both.
"""

from moe_jax.kernels import output_first, per_expert, platform
from moe_jax.kernels.experts import Experts, ExpertWeights
from moe_jax.kernels.linear import Weight
from moe_jax.kernels.output_first import OutputFirst


def packs() -> bool:
  """Whether the mesh in force is one CPU device, for which the functions below pack."""
  return platform.one_cpu()


def matrix(weight: Weight, inner: int = 1) -> Weight:
  """A weight [*inner, *outer] for `linear`, of which `inner` dimensions are summed over."""
  if not packs() or isinstance(weight, OutputFirst):
    return weight
  return output_first.pack(weight, inner)


def experts(weights: ExpertWeights) -> ExpertWeights:
  """Stacked experts for `experts`; packed ones have no gradient."""
  return per_expert.pack(*weights) if packs() and isinstance(weights, Experts) else weights
