"""The device mesh, and which mesh axis each letter of a name is sharded over.

Every tensor and parameter name ends in its shape letters, and the letters are all there is to say
about sharding: `up_EDF` is split over ('expert', 'fsdp', 'tensor').

  B batch            L query length     S key length       T tokens of a routing group
  M routing groups   D model            H query heads      G key/value heads
  A head width       F ffn              V vocabulary       E experts
  K choices          C slots per expert N assignments      Z stacked layers
  P parts of the sequence
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax import config as config_lib

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # every device of these holds different sequences

_ACTIVATION_AXES = {
  "B": BATCH_AXES, "M": BATCH_AXES, "E": "expert", "F": "tensor", "H": "tensor", "G": "tensor",
  "V": "tensor", "D": None, "L": None, "S": None, "A": None, "K": None, "C": None, "T": None,
}  # fmt: skip
_PARAM_AXES = _ACTIVATION_AXES | {"D": "fsdp", "Z": None}
_REPLICATED = ("bias_ZE", "load_ZE")  # beside the parameters that are declared so


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
  """A parameter about which the letters of its name do not say everything.

  To create a record is to declare the name: sharding, weight decay and metrics look it up, and no
  list elsewhere has to be kept. A parameter is made by its record, so it cannot be undeclared.

  Raises:
    ValueError: another record has declared the same name otherwise.
  """

  name: str
  # (nnx.Rngs, {"D": size of D, ...}) -> float32
  initial: Callable[..., jax.Array] = dataclasses.field(compare=False)
  replicated: bool  # whole on every device, in place of split by its letters
  decays: bool  # under weight decay
  group: str  # of its gradient norm in the metrics

  def __post_init__(self) -> None:
    other = _declared.setdefault(self.name, self)
    if other != self:
      raise ValueError(f"{self.name} is declared twice: {other} and {self}")


_declared: dict[str, Parameter] = {}


def declared(name: str) -> Parameter | None:
  """The record of a parameter, or None where its letters say everything."""
  return _declared.get(name)


def make_mesh(mesh: config_lib.Mesh) -> jax.sharding.Mesh:
  """A mesh over all devices; `mesh` is resolved (its product is the device count)."""
  # Auto axes, stated: make_mesh defaults to Explicit, which shard_map's in_specs do not take.
  shape = tuple(getattr(mesh, axis) for axis in AXES)
  devices = jax.devices()[: math.prod(shape)]
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def fit_mesh(mesh: config_lib.Mesh, batch_size: int) -> config_lib.Mesh:
  """A run's own mesh where it takes all devices of this machine, otherwise one over the batch.

  Results do not depend on the mesh, so a checkpoint of 64 devices serves on one. The other mesh has
  as many devices as divide `batch_size` sequences.
  """
  if mesh.data * mesh.fsdp * mesh.expert * mesh.tensor == jax.device_count():
    return mesh
  return config_lib.Mesh(data=math.gcd(batch_size, jax.device_count()))


def spec(letters: str) -> PartitionSpec:
  """The PartitionSpec of an activation, 'BLD' -> P(('data', 'fsdp', 'expert'), None, None)."""
  return _to_spec(letters, _ACTIVATION_AXES)


def param_spec(name: str, ndim: int) -> PartitionSpec:
  """The PartitionSpec of a parameter; leading dimensions beyond its letters are stacked layers."""
  letters = name.rsplit("_", 1)[-1]
  stacked = ndim - len(letters)
  assert stacked in (0, 1), f"{name} has {ndim} dimensions"
  parameter = declared(name)
  if name in _REPLICATED or (parameter is not None and parameter.replicated):
    return PartitionSpec()
  return _to_spec("Z" * stacked + letters, _PARAM_AXES)


def _to_spec(letters: str, table: Mapping[str, Any]) -> PartitionSpec:
  axes = [table[letter] for letter in letters]
  flat = [a for axis in axes if axis for a in (axis if isinstance(axis, tuple) else (axis,))]
  assert len(flat) == len(set(flat)), f"{letters}: two dimensions on one mesh axis: {flat}"
  return PartitionSpec(*axes)


def constrain(x: jax.Array, letters: str) -> jax.Array:
  """Pins an activation's sharding, on the mesh that `jax.set_mesh` has put in force."""
  return jax.lax.with_sharding_constraint(x, spec(letters))


def param_name(path: tuple[Any, ...]) -> str:
  """The last name on a tree path that ends in shape letters, 'up_EDF'; "" if there is none."""
  names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
  return next((n for n in reversed(names) if "_" in n and n.rsplit("_", 1)[-1].isupper()), "")


def param_shardings(
  tree: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, params: Any = ()
) -> Any:
  """A NamedSharding for every leaf, found by the last name on its path.

  Args:
    tree: parameters, or what holds copies of them and more, as a train state does.
    mesh: to be sharded over.
    params: whose copies the tree holds, so that a leaf under a parameter's path may lack one of its
      dimensions (Adafactor's rows and columns). Any other leaf, such as a count, is replicated.
  """
  shapes = {path: p.shape for path, p in jax.tree_util.tree_leaves_with_path(params)}

  def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    name, spec = param_name(path), PartitionSpec()
    if name and leaf.ndim:
      ends = (path[start:] for start in range(len(path)))
      shape = next((shapes[end] for end in ends if end in shapes), leaf.shape)
      spec = _without_an_axis(param_spec(name, len(shape)), shape, leaf.shape)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, tree)


def _without_an_axis(
  full: PartitionSpec, shape: tuple[int, ...], left: tuple[int, ...]
) -> PartitionSpec:
  """`full`, of `shape`, for what is `left` of it; where two axes are equal, either may be gone."""
  if left == shape:
    return full
  axes = [*full, *[None] * (len(shape) - len(full))]
  gone = (a for a in range(len(shape)) if shape[:a] + shape[a + 1 :] == left)
  return next((PartitionSpec(*axes[:a], *axes[a + 1 :]) for a in gone), PartitionSpec())


def to_global(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Host-local [B/processes, ...] arrays -> global arrays split over the batch axes."""
  sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
