"""The device mesh, and the mesh axis over which each dimension of an array is split.

The name of every array and parameter ends in one letter for each of its dimensions, and the letters
alone say how it is split: `up_EDF` is split over the axes ('expert', 'fsdp', 'tensor').

  B batch            L query length     S key length       T tokens of a routing group
  M routing groups   D model            H query heads      G key/value heads
  A head width       F ffn              V vocabulary       E experts
  K choices          C slots per expert N assignments      Z stacked layers
  P parts of the sequence
  In the delta rule: J heads of keys, I their width, O heads of values, X their width, U channels,
  Y and R what a head of keys has of several things.
  In latent attention: Q latent of queries, W latent of keys and values, R rotated width, U W and R,
  X width of a head of values, Y a head's unrotated key and its value.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.config import Mesh
from moe_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")
SEQUENCE_AXES = ("data", "fsdp", "expert")  # devices along these axes hold different sequences
# Devices along these hold different rows: sequences, or parts of them (kernels/context.py).
BATCH_AXES = (*SEQUENCE_AXES, "context")

_ACTIVATION_AXES: dict[str, Any] = {
  "B": BATCH_AXES, "M": BATCH_AXES, "E": "expert", "F": "tensor", "H": "tensor", "G": "tensor",
  "V": "tensor", "D": None, "L": None, "S": None, "A": None, "K": None, "C": None, "T": None,
  "Q": None, "W": None, "R": None, "U": None, "X": None, "Y": None, "J": None, "I": None,
  "O": None,
}  # fmt: skip
_PARAM_AXES = _ACTIVATION_AXES | {"D": "fsdp", "Z": None}
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
_REPLICATED = ("bias_ZE", "load_ZE")  # and the parameters that a Parameter record declares so


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
  """Describes a parameter that is treated otherwise than the letters of its name say.

  Creating a record declares the name: sharding, weight decay and metrics look the record up by it,
  so that no other list of parameters is needed. The model makes the parameter with the record.

  Raises:
    ValueError: another record has declared the same name with other properties.
  """

  name: str
  # (nnx.Rngs, {"D": size of D, ...}) -> the initial values, float32
  initial: Callable[..., jax.Array] = dataclasses.field(compare=False)
  replicated: bool  # whether every device holds all of it, whatever its letters say
  decays: bool  # whether weight decay applies to it
  group: str  # the group of parameters in whose gradient norm it counts

  def __post_init__(self) -> None:
    other = _declared.setdefault(self.name, self)
    if other != self:
      raise ValueError(f"{self.name} is declared twice: {other} and {self}")


_declared: dict[str, Parameter] = {}


def is_matrix(name: str) -> bool:
  """Returns whether a parameter is one, or a stack of them: no scale of a norm, and no bias."""
  return len(name.rsplit("_", 1)[-1]) > 1 and not name.startswith("norm_") and "bias_" not in name


def declared(name: str) -> Parameter | None:
  """Returns the record of a parameter; None where the letters of its name say everything."""
  return _declared.get(name)


def make_mesh(mesh: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Returns the mesh of these sizes, over the first devices of each process.

  Args:
    mesh: resolved, so that each axis has a size; a run's sizes make up all devices.
    devices: to take them from, by default those here; those of a topology need not be present.
  """
  some = _first_of_each_process(mesh, devices)
  device_mesh = _on_torus(mesh, some, split=not _fits_torus(mesh, some))
  check_processes(_processes(device_mesh))
  # The axes have to be Auto: shard_map's in_specs do not take Explicit.
  return jax.sharding.Mesh(device_mesh, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_notice(mesh: Mesh, devices: Sequence[jax.Device] | None = None) -> str:
  """Returns what to say of a mesh that splits an axis of a TPU slice's torus; "" for no such mesh.

  The arguments are those of `make_mesh`. Named are sizes that need no split, those with the most of
  the mesh's `expert` first.
  """
  some = _first_of_each_process(mesh, devices)
  if _fits_torus(mesh, some):
    return ""
  experts = [n for n in range(mesh.expert, 0, -1) if not mesh.expert % n]
  rest = {n: len(some) // mesh.tensor // mesh.context // n for n in experts}
  others = (
    dataclasses.replace(mesh, data=data, fsdp=rest[n] // data, expert=n)
    for n in experts
    for data in range(1, rest[n] + 1)
    if not rest[n] % data
  )
  whole = (f"{o.data} x {o.fsdp} x {o.expert}" for o in others if _fits_torus(o, some))
  return (
    f"config.mesh.data={mesh.data} x fsdp={mesh.fsdp} x expert={mesh.expert} splits an axis of this"
    " slice's torus, whose links its parts share; sizes without a split: "
    + (", ".join(itertools.islice(whole, 3)) or "none")
  )


def _first_of_each_process(mesh: Mesh, devices: Sequence[jax.Device] | None) -> list[jax.Device]:
  devices = jax.devices() if devices is None else devices
  processes = sorted({device.process_index for device in devices})
  share = mesh.devices // len(processes)
  by_process = ([d for d in devices if d.process_index == index] for index in processes)
  return [device for some in by_process for device in some[:share]]


def _on_torus(mesh: Mesh, devices: list[jax.Device], split: bool) -> np.ndarray:
  """Returns the devices in the mesh's shape, neighbours on a TPU's torus together."""
  shape = tuple(getattr(mesh, axis) for axis in AXES)
  # Of TPUs, which have places on a torus; a GPU's slice is its host.
  torus = [device for device in devices if hasattr(device, "coords")]
  slices = len({getattr(device, "slice_index", 0) for device in torus})
  if slices <= 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
  if mesh.data % slices:
    raise UserError(
      f"config.mesh.data={mesh.data} does not divide over {slices} slices: only `data` crosses the "
      f"network between slices; choose a multiple of {slices}"
    )
  inside, across = (mesh.data // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
  return mesh_utils.create_hybrid_device_mesh(
    inside, across, devices, allow_split_physical_axes=split
  )


def _fits_torus(mesh: Mesh, devices: list[jax.Device]) -> bool:
  """Returns whether each axis of the mesh is a product of whole axes of the torus."""
  try:
    _on_torus(mesh, devices, split=False)
  except NotImplementedError:
    return False
  return True


def _processes(devices: np.ndarray) -> np.ndarray:
  return np.vectorize(lambda device: device.process_index)(devices)


def feeder(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """Returns (index, count) of this process among those that read sequences of their own.

  Processes that hold parts of the same sequences read the same ones.
  """
  processes = _processes(mesh.devices)
  firsts = processes.min(axis=(-2, -1))
  own = firsts[(processes == jax.process_index()).any(axis=(-2, -1))]
  feeders = np.unique(firsts)
  return int(np.searchsorted(feeders, own[0])), len(feeders)


def check_processes(processes: np.ndarray) -> None:
  """Refuses a mesh on which processes would feed different sequences to the same place.

  Args:
    processes: the process of each device, int [data, fsdp, expert, context, tensor].

  Raises:
    UserError: the devices of one place on the batch axes belong to several processes, or processes
      have some of their sequences in common and not all.
  """
  if (processes != processes[..., :1]).any():
    raise UserError(
      f"config.mesh.tensor={processes.shape[-1]}: every process feeds sequences of its own, and on "
      "this mesh some sequences are on devices of several processes; choose a tensor axis that "
      f"divides the {np.sum(processes == processes.flat[0])} device(s) of a process"
    )
  firsts = np.broadcast_to(processes.min(axis=(-2, -1), keepdims=True), processes.shape)
  pairs = np.unique(np.stack([processes.ravel(), firsts.ravel()]), axis=1)
  if pairs.shape[1] > len(np.unique(processes)):
    raise UserError(
      f"config.mesh.context={processes.shape[-2]}: some processes would feed the same sequences "
      "and others only some of those; choose a context axis that divides the devices of a "
      "process, or that a process's devices divide"
    )


def fit_mesh(mesh: Mesh, parts: int) -> Mesh:
  """Returns a run's own mesh if it takes all devices here, otherwise a mesh that splits the batch.

  Results do not depend on the mesh, so one device can use a checkpoint of 64 devices. The returned
  mesh has the largest number of devices that divides both `parts` and the devices here.

  Args:
    mesh: of the run.
    parts: into how many equal parts a batch can be split without a cut through a routing group.

  Raises:
    UserError: the batch does not split over the processes.
  """
  own = mesh.devices == jax.device_count()
  if own and jax.local_device_count() % mesh.tensor == 0:
    return mesh
  devices = math.gcd(parts, jax.device_count())
  if devices % jax.process_count():
    raise UserError(
      f"--multihost: a batch of {parts} parts does not split over {jax.process_count()} "
      "processes; start fewer, or a single one without --multihost"
    )
  return Mesh(data=devices)


def of_whole_sequences(mesh: Mesh) -> Mesh:
  """Returns the mesh with `context` as more of `data`, for programs that split no sequence."""
  data = mesh.data * mesh.context if mesh.data > 0 else mesh.data
  return dataclasses.replace(mesh, data=data, context=1)


def spec(letters: str) -> PartitionSpec:
  """Returns an activation's PartitionSpec, P(BATCH_AXES, None, 'tensor', None) of 'BLHA'."""
  return _to_spec(letters, _ACTIVATION_AXES)


def param_spec(
  name: str, shape: tuple[int, ...], mesh: AnyMesh, *, spread: bool = True
) -> PartitionSpec:
  """Returns the PartitionSpec of a parameter.

  An array with one dimension more than its name has letters is stacked: the first dimension counts
  the layers.

  Args:
    name: ends in shape letters.
    shape: of the array.
    mesh: to split over.
    spread: whether matrices that are no experts are split over `expert` too, where D allows it.
      That saves memory; each use gathers them.
  """
  letters = name.rsplit("_", 1)[-1]
  stacked = len(shape) - len(letters)
  assert stacked in (0, 1), f"{name} has {len(shape)} dimensions"
  parameter = declared(name)
  if name in _REPLICATED or (parameter is not None and parameter.replicated):
    return PartitionSpec()
  letters = "Z" * stacked + letters
  table, letter = _PARAM_AXES, gathered_letter(name)
  if letter:
    size, fsdp = shape[letters.index(letter)], mesh.shape["fsdp"]
    if spread and "E" not in letters and not size % (mesh.shape["expert"] * fsdp):
      table = table | {letter: ("expert", "fsdp")}
    elif not size % fsdp:
      table = table | {letter: "fsdp"}
  return _to_spec(letters, table)


def gathered_letter(name: str) -> str:
  """Returns the letter along which `fsdp` splits a matrix: D or, without it, a latent's Q or W."""
  letters = name.rsplit("_", 1)[-1]
  return next((a for a in "DQW" if a in letters), "") if is_matrix(name) else ""


def _to_spec(letters: str, table: Mapping[str, Any]) -> PartitionSpec:
  axes = [table[letter] for letter in letters]
  flat = [a for axis in axes if axis for a in (axis if isinstance(axis, tuple) else (axis,))]
  assert len(flat) == len(set(flat)), f"{letters}: two dimensions on one mesh axis: {flat}"
  return PartitionSpec(*axes)


def constrain(x: jax.Array, letters: str) -> jax.Array:
  """Returns the activation, split as the letters say over the mesh of `jax.set_mesh`."""
  return jax.lax.with_sharding_constraint(x, spec(letters))


def param_name(path: tuple[Any, ...]) -> str:
  """Returns the last name on a tree path that ends in shape letters, 'up_EDF'; "" if none does."""
  names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
  return next((n for n in reversed(names) if "_" in n and n.rsplit("_", 1)[-1].isupper()), "")


def path_of(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Returns the names on the path of a parameter, as model.cost.parameters has them."""
  return tuple(str(key.key) for key in path if hasattr(key, "key"))


def param_shardings(tree: Any, mesh: AnyMesh, params: Any = (), *, spread: bool = True) -> Any:
  """Returns the NamedSharding of every array of a tree, by the last name on the array's path.

  Args:
    tree: parameters, or a tree that holds arrays of the same names, such as a train state. An array
      without a name, such as a count, is replicated.
    mesh: the mesh to split over.
    params: the parameters, where the tree has arrays that lack one dimension of a parameter, as
      Adafactor's rows and columns do.
    spread: see `param_spec`.
  """
  shapes = {path: p.shape for path, p in jax.tree_util.tree_leaves_with_path(params)}

  def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    name, spec = param_name(path), PartitionSpec()
    if name and leaf.ndim:
      ends = (path[start:] for start in range(len(path)))
      shape = next((shapes[end] for end in ends if end in shapes), leaf.shape)
      spec = _without_an_axis(param_spec(name, shape, mesh, spread=spread), shape, leaf.shape)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, tree)


def _without_an_axis(
  full: PartitionSpec, shape: tuple[int, ...], left: tuple[int, ...]
) -> PartitionSpec:
  """Returns the PartitionSpec of an array from which one dimension has been summed away.

  Args:
    full: the PartitionSpec of the whole array.
    shape: of the whole array.
    left: the shape without the dimension. Of two dimensions of one size, the first is taken to be
      the missing one. If more than one is missing, the array is replicated.
  """
  if left == shape:
    return full
  axes = [*full, *[None] * (len(shape) - len(full))]
  gone = (a for a in range(len(shape)) if shape[:a] + shape[a + 1 :] == left)
  return next((PartitionSpec(*axes[:a], *axes[a + 1 :]) for a in gone), PartitionSpec())


def to_global(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns global arrays, split over the sequence axes, made of each process's own sequences.

  Args:
    batch: arrays [B / count, ...] of this process; `feeder` has the count.
    mesh: the mesh to split over.
  """
  sharding = NamedSharding(mesh, PartitionSpec(SEQUENCE_AXES))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def place(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns global arrays, split over sequence axes, of arrays that each process has as a whole.

  Args:
    batch: arrays [B, ...], the same in all processes.
    mesh: the mesh to split over.
  """
  sharding = NamedSharding(mesh, PartitionSpec(SEQUENCE_AXES))
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
  )


def whole(arrays: Any) -> Any:
  """Returns global arrays as NumPy arrays, in every process."""
  return multihost_utils.process_allgather(arrays, tiled=True)
