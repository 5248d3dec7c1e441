"""Whether a checkpoint is what was saved: digests of its arrays, and what its small files say."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import DamagedError
from moe_jax.storage import files

_METADATA = "_CHECKPOINT_METADATA"
_METRICS = "metrics/metrics"


def array_digests(tree: Any) -> tuple[dict[str, str], bool]:
  """Returns ({name of an array: its kind and digest}, whether all numbers are finite).

  Digests are computed on the devices that hold the arrays, and do not depend on the mesh. A change
  of one number always changes its array's digest; another change does with a chance of 1 - 2^-32.
  """
  sums, finite = jax.device_get(_digest(jax.tree.leaves(tree)))
  named = zip(kinds(tree).items(), sums, strict=True)
  return {name: f"{kind} {number:08x}" for (name, kind), number in named}, bool(finite)


def kinds(tree: Any) -> dict[str, str]:
  """Returns {name of an array: its type and shape}, such as float32[4,2]."""
  return {
    _name(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _name(path: tuple[Any, ...]) -> str:
  """Returns params/scans/0/blocks/0/ffn/up_EDF for a path in a tree."""
  keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", ""))) for k in path)
  return "/".join(str(key) for key in keys if key != "value")  # which flax puts below parameters


@jax.jit
def _digest(arrays: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
  finite = [jnp.all(jnp.isfinite(x)) for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
  return [_array_digest(x) for x in arrays], jnp.all(jnp.array(finite))


@jax.jit  # traced once for all arrays of a shape
def _array_digest(x: jax.Array) -> jax.Array:
  """Returns the sum of hashes of (place, bits), uint32 [], which a sharded array adds up in parts.

  The hash of a place's bits is a permutation of the 32-bit numbers, so no two values are equal.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  place = jnp.full(x.shape, x.size % 2**32, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(_mixed(bits.astype(jnp.uint32) ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
  """Returns MurmurHash3's finaliser of each number, a permutation of the 32-bit numbers."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> np.uint32(shift))) * jnp.uint32(factor)
  return x ^ (x >> np.uint32(16))


def unreadable(folder: pathlib.Path) -> str:
  """Returns what is wrong with the small files of a checkpoint, by which Orbax opens and keeps it.

  "" where they are as they should be.
  """
  try:
    found = [files.read_json(folder / n, "") for n in (_METADATA, _METRICS, "about/metadata")]
  except DamagedError as error:
    return str(error)
  items, loss = found[0].get("item_handlers"), found[1].get("loss")
  if not isinstance(items, dict) or not isinstance(loss, float):
    return f"{folder} has no {'items' if not isinstance(items, dict) else 'loss'}"
  # A checkpoint of before there were digests has no copy of its loss.
  about = found[2].get("about", {"loss": str(loss)})
  saved = about.get("loss") if isinstance(about, dict) else about
  return "" if saved == str(loss) else f"the loss is {loss}, not {saved}"


def has_digests(folder: pathlib.Path) -> bool:
  """Returns whether a checkpoint was saved with digests, also where they are missing now."""
  items = files.read_json(folder / _METADATA, "").get("item_handlers")
  return (folder / "about").exists() or "about" in str(items)


def next_batch(folder: pathlib.Path) -> int | None:
  """Returns the number of the batch after a checkpoint of before there were digests.

  Every process wrote a file, all with the same number. None where there is none.
  """
  paths = sorted((folder / "data").glob("process_*.json"))
  number = files.read_json(paths[0], "").get("next_index") if paths else None
  return number if isinstance(number, int) else None
