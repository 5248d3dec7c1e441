"""The nats of each token's successor: of all logits at once, or of a few tokens' at a time.

At a vocabulary of 151,936 the logits of 4,096 tokens are 2.3 GiB, and so are their gradients.
`nll_in_chunks` computes the logits of a chunk of tokens, keeps of them what the loss is made of,
and computes them again for the gradient.

Letters: T tokens of one device, N chunks of C tokens; V the words of this device of `tensor`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import sharding
from moe_jax.kernels.autodiff import vary_alike
from moe_jax.kernels.gathered import Copies

Scaling = Callable[[jax.Array], jax.Array]  # of logits, elementwise


@jax.named_scope("loss")
def token_nll(logits_BLV: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (the nats of each target, the logsumexp of each position's logits), float32 [B, L]."""
  log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
  target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
  return log_z_BL - target_BL, log_z_BL


def nll_in_chunks(
  x_BLD: jax.Array, head_DV: jax.Array | Copies, targets_BL: jax.Array, chunk: int, scaling: Scaling
) -> tuple[jax.Array, jax.Array]:
  """Returns what `token_nll` returns for the logits scaling(x_BLD @ head_DV).

  Args:
    x_BLD: normed tokens, in the dtype of the head. Each device computes its own.
    head_DV: the matrix, whole along D on each device.
    targets_BL: int32.
    chunk: the most tokens of a device whose logits are in memory at once.
    scaling: what is done to the float32 logits.
  """
  mesh = jax.sharding.get_abstract_mesh()
  words = "" if mesh.empty or mesh.size == 1 else "tensor"

  def on_device(
    x_BLD: jax.Array, head: jax.Array, targets_BL: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    shape, head_DV = targets_BL.shape, head.reshape(head.shape[-2:])
    T = math.prod(shape)
    chunks = next(n for n in range(-(-T // chunk), T + 1) if not T % n)
    x_BLD, head_DV = vary_alike((x_BLD, head_DV))  # sums gradients over devices that share one
    found = _nll(x_BLD.reshape(T, -1), head_DV, targets_BL.reshape(T), chunks, scaling, words)
    return found[0].reshape(shape), found[1].reshape(shape)

  copied = isinstance(head_DV, Copies)
  head = head_DV.stored if isinstance(head_DV, Copies) else head_DV
  if not words:
    return on_device(x_BLD, head, targets_BL)
  tokens = sharding.spec("BL")
  first = (sharding.BATCH_AXES,) if copied else ()
  split = jax.sharding.PartitionSpec(*first, None, "tensor")
  specs = (sharding.spec("BLD"), split, tokens)
  return jax.shard_map(on_device, in_specs=specs, out_specs=(tokens, tokens))(
    x_BLD, head, targets_BL
  )


def _forward(
  x_TD: jax.Array,
  head_DV: jax.Array,
  targets_T: jax.Array,
  chunks: int,
  scaling: Scaling,
  words: str,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
  """Returns (nll_T, log_z_T) and what the gradient reads; the mesh axis `words` splits V."""

  def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    x_CD, targets_C = chunk
    logits_CV = scaling(_product(x_CD, head_DV))
    with jax.named_scope("loss"):
      most_C = jnp.max(logits_CV, axis=-1)
      most_C = jax.lax.pmax(most_C, words) if words else most_C
      exp_C = jnp.sum(jnp.exp(logits_CV - most_C[:, None]), axis=-1)
      is_target_CV = _is_target(targets_C, logits_CV, words)
      target_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
      if words:
        exp_C, target_C = jax.lax.psum((exp_C, target_C), words)
      log_z_C = jnp.log(exp_C) + most_C
    return log_z_C - target_C, log_z_C

  found_NC = jax.lax.map(of_chunk, (_parts(x_TD, chunks), _parts(targets_T, chunks)))
  nll_T, log_z_T = (x_NC.reshape(-1) for x_NC in found_NC)
  return (nll_T, log_z_T), (x_TD, head_DV, targets_T, log_z_T)


def _backward(
  chunks: int,
  scaling: Scaling,
  words: str,
  kept: tuple[jax.Array, ...],
  gradients: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
  x_TD, head_DV, targets_T, log_z_T = kept

  def of_chunk(d_head_DV: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    x_CD, targets_C, log_z_C, d_nll_C, d_log_z_C = chunk
    logits_CV, pull = jax.vjp(scaling, _product(x_CD, head_DV))
    with jax.named_scope("loss"):
      d_CV = jnp.exp(logits_CV - log_z_C[:, None]) * (d_nll_C + d_log_z_C)[:, None]
      d_CV -= jnp.where(_is_target(targets_C, logits_CV, words), d_nll_C[:, None], 0)
      d_CV = pull(d_CV)[0].astype(head_DV.dtype)
    with jax.named_scope("head"):
      # The sum over chunks is float32, as that over the tokens of one product is.
      d_head_DV += jnp.dot(x_CD.T, d_CV, preferred_element_type=jnp.float32)
      return d_head_DV, jnp.dot(d_CV, head_DV.T)

  zeros_DV = vary_alike((jnp.zeros(head_DV.shape, jnp.float32), head_DV, x_TD))[0]
  of_tokens = (x_TD, targets_T, log_z_T, *gradients)
  parts = tuple(_parts(x, chunks) for x in of_tokens)
  d_head_DV, d_x_NCD = jax.lax.scan(of_chunk, zeros_DV, parts)
  return d_x_NCD.reshape(x_TD.shape), d_head_DV.astype(head_DV.dtype), None


_nll = jax.custom_vjp(lambda *args: _forward(*args)[0], nondiff_argnums=(3, 4, 5))
_nll.defvjp(_forward, _backward)


@jax.named_scope("head")
def _product(x_CD: jax.Array, head_DV: jax.Array) -> jax.Array:
  return jnp.dot(x_CD, head_DV, preferred_element_type=jnp.float32)


def _parts(x: jax.Array, chunks: int) -> jax.Array:
  return x.reshape(chunks, -1, *x.shape[1:])


def _is_target(targets_C: jax.Array, logits_CV: jax.Array, words: str) -> jax.Array:
  """Returns bool [C, V], whether a word of this device is the token's target."""
  V = logits_CV.shape[1]
  first = jax.lax.axis_index(words) * V if words else 0
  return jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == (targets_C - first)[:, None]
