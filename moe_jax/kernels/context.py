"""Context parallelism: the parts of a sequence on the devices of the mesh axis `context`.

A device's part of a sequence is a row of its own inside the model: sequences [B, L] become rows
[B * P, L / P], which all batch axes split. So what looks at one token at a time, or at the routing
groups of a device, knows nothing of it. Attention gathers the keys and values of whole sequences.

A causal query does more work the later it stands. So a sequence is cut into 2P pieces, and device p
holds pieces p and 2P-1-p ("zigzag", Llama 3 2407.21783 section 3.3.2): as much work as any other.

P: parts of a sequence. B and L: sequences and their tokens here, rows and theirs in the model.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.kernels.mask import Mask

Tree = TypeVar("Tree")  # of arrays


class Part(NamedTuple):
  """Which tokens of a sequence the queries are, where they are not all of it."""

  number: jax.Array | int  # of the part
  parts: int  # P
  segments_BL: Any  # int32, the document of each query

  def places(self, index: jax.Array, length: int) -> jax.Array:
    """Returns the places in the sequence of tokens with this int32 index in a part of `length`."""
    back = 2 * self.parts - 2 - self.number
    return index + length // 2 * jnp.where(index < length // 2, self.number, back)


def parts() -> int:
  """Returns P of the mesh in force."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape["context"]


def places(index: jax.Array, length: int) -> jax.Array:
  """Returns, inside shard_map, what Part.places returns for the part of the device."""
  return index if parts() == 1 else _here().places(index, length)


def _here(segments_BL: Any = None) -> Part:
  return Part(jax.lax.axis_index("context"), parts(), segments_BL)


def order(length: int, count: int) -> np.ndarray:
  """Returns the place in its sequence of each token of all parts, one after the other, int32."""
  pieces = np.arange(length, dtype=np.int32).reshape(2 * count, -1)
  return pieces[_pieces(count)].reshape(-1)


def _pieces(count: int) -> np.ndarray:
  first = np.arange(count)
  return np.stack([first, 2 * count - 1 - first], axis=1).reshape(-1)


def split(sequences: Tree) -> Tree:
  """Returns a tree of arrays [B, L, ...], split over the sequence axes, as the model's rows."""
  count = parts()

  def one(x: jax.Array) -> jax.Array:
    (B, L), rest = x.shape[:2], x.shape[2:]
    x = x.reshape(_devices(), -1, 2 * count, L // (2 * count), *rest)[:, :, _pieces(count)]
    x = x.reshape(_devices(), -1, count, L // count, *rest).swapaxes(1, 2)
    return _placed(x.reshape(B * count, L // count, *rest), sharding.BATCH_AXES)

  return sequences if count == 1 else jax.tree.map(one, sequences)


def join(rows: Tree) -> Tree:
  """Returns a tree of arrays of the model's rows as sequences: the inverse of `split`."""
  count = parts()

  def one(x: jax.Array) -> jax.Array:
    (B, L), rest = x.shape[:2], x.shape[2:]
    x = x.reshape(_devices(), count, -1, L, *rest).swapaxes(1, 2)
    x = x.reshape(_devices(), -1, 2 * count, L // 2, *rest)[:, :, np.argsort(_pieces(count))]
    return _placed(x.reshape(B // count, L * count, *rest), sharding.SEQUENCE_AXES)

  return rows if count == 1 else jax.tree.map(one, rows)


def drawn(draw: Callable[[tuple[int, ...]], jax.Array], shape: tuple[int, ...]) -> jax.Array:
  """Returns draw(shape) for rows [B, L, ...], of which a token gets the same on every mesh."""
  return split(draw((shape[0] // parts(), shape[1] * parts(), *shape[2:])))


def _devices() -> int:
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in sharding.SEQUENCE_AXES)


def _placed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(axes))


def over_sequences(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Returns `attend` for rows, of which each attends to its whole sequence.

  Both take (q_BLHA, k_BLGA, v_BLGX, segments_BL, mask) and return y_BLHX; v_BLGX may be None. The
  inner one gets keys, values and segments of whole sequences, and mask.context. So every device has
  the keys of all pieces, of one layer at a time; their gradients are summed and scattered.
  """
  if parts() == 1:
    return attend

  def rows(q: jax.Array, k: jax.Array, v: Any, segments: jax.Array, mask: Mask) -> jax.Array:
    def on_device(
      q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGX: Any, segments_BL: jax.Array, sinks_H: Any
    ) -> jax.Array:
      with jax.named_scope("gather"):
        k_BLGA, v_BLGX, all_BL = jax.tree.map(_gathered, (k_BLGA, v_BLGX, segments_BL))
      own = mask._replace(sinks_H=sinks_H, context=_here(segments_BL))
      return attend(q_BLHA, k_BLGA, v_BLGX, all_BL, own)

    specs = tuple(sharding.spec(letters) for letters in ("BLHA", "BLGA", "BLGA", "BL", "H"))
    # As in attention_local.py: the replication check cannot see into a Pallas call.
    return jax.shard_map(on_device, in_specs=specs, out_specs=specs[0], check_vma=False)(
      q, k, v, segments, mask.sinks_H
    )

  return rows


def _gathered(x: jax.Array) -> jax.Array:
  """Returns whole sequences of a device's rows [B, L, ...], in their order."""
  (B, L), rest = x.shape[:2], x.shape[2:]
  x = jax.lax.all_gather(x, "context").reshape(-1, B, 2, L // 2, *rest)
  x = jnp.concatenate([x[:, :, 0], x[::-1, :, 1]])
  return jnp.moveaxis(x, 0, 1).reshape(B, -1, *rest)
