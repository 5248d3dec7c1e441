"""The kinds of layers of a model, and where the parameters of each layer stand."""

from typing import NamedTuple

from moe_jax.config import Model
from moe_jax.kernels import mask
from moe_jax.kernels.mask import Mask


class LayerKind(NamedTuple):
  """What is not the same in all layers."""

  is_moe: bool
  mask: Mask  # of its attention, without the sinks, which are weights
  delta: bool  # whether the delta rule takes the place of attention


def layer_kinds(model: Model) -> list[LayerKind]:
  """Returns the kind of each layer, first layer first."""
  moe = model.moe

  def kind(layer: int) -> LayerKind:
    is_global = model.global_every > 0 and (layer + 1) % model.global_every == 0
    delta = model.delta.value_heads > 0 and not is_global
    return LayerKind(moe.in_layer(layer), mask.of_layer(model, is_global=is_global), delta)

  return [kind(layer) for layer in range(model.num_layers)]


def layer_pattern(model: Model) -> list[tuple[int, tuple[LayerKind, ...]]]:
  """Returns [(repeats, kinds of the layers in the repeated unit)], first layer first."""
  kinds = layer_kinds(model)
  first_dense = model.moe.first_dense if model.moe.num_experts else 0
  scans = []
  for part in (kinds[:first_dense], kinds[first_dense:]):
    sizes = range(1, len(part) + 1)
    size = next((n for n in sizes if part[n:] == part[:-n]), 0)
    if size:
      repeats = len(part) // size
      scans += [(repeats, tuple(part[:size])), (1, tuple(part[repeats * size :]))]
  return [(repeats, unit) for repeats, unit in scans if unit]


def layer_places(model: Model) -> list[tuple[tuple[str, ...], int]]:
  """Returns (path of the parameters in which it is stacked, its place on Z) of each layer."""
  return [
    (("scans", str(scan), "blocks", str(block)), repeat)
    for scan, (repeats, unit) in enumerate(layer_pattern(model))
    for repeat in range(repeats)
    for block in range(len(unit))
  ]


def moe_layers(model: Model) -> list[int]:
  """Returns the index of each MoE layer in the network, in the order of Z in statistics."""
  return [index for index, kind in enumerate(layer_kinds(model)) if kind.is_moe]


def bias_shape(model: Model) -> tuple[int, int]:
  """Returns the biases' shape [Z, E]; [1, 1] if dense, because Orbax saves no empty array."""
  return max(len(moe_layers(model)), 1), max(model.moe.num_experts, 1)
