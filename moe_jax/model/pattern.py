"""Which layers have experts, and where the parameters of each layer stand."""

from moe_jax import config as config_lib


def layer_pattern(model: config_lib.Model) -> list[tuple[int, tuple[bool, ...]]]:
  """Returns [(repeats, (is_moe of each layer in the repeated unit))], first layer first."""
  moe = model.moe
  if not moe.num_experts:
    return [(model.num_layers, (False,))]
  unit = (False,) * (moe.every - 1) + (True,)
  scans = [(moe.first_dense, (False,)), ((model.num_layers - moe.first_dense) // moe.every, unit)]
  return [(repeats, pattern) for repeats, pattern in scans if repeats]


def layer_places(model: config_lib.Model) -> list[tuple[tuple[str, ...], int]]:
  """Returns (path of the parameters in which it is stacked, its place on Z) of each layer."""
  return [
    (("scans", str(scan), "blocks", str(block)), repeat)
    for scan, (repeats, pattern) in enumerate(layer_pattern(model))
    for repeat in range(repeats)
    for block in range(len(pattern))
  ]


def moe_layers(model: config_lib.Model) -> list[int]:
  """Returns the index of each MoE layer in the network, in the order of Z in statistics."""
  flat = [is_moe for repeats, pattern in layer_pattern(model) for is_moe in pattern * repeats]
  return [index for index, is_moe in enumerate(flat) if is_moe]


def bias_shape(model: config_lib.Model) -> tuple[int, int]:
  """Returns the biases' shape [Z, E]; [1, 1] if dense, because Orbax saves no empty array."""
  return max(len(moe_layers(model)), 1), max(model.moe.num_experts, 1)
