"""Attention for TPU: the splash kernel that comes with jax (Pallas), forward and backward.

The kernel skips blocks of keys that are later than the queries, and compares the documents' numbers
itself, so no array of size [L, L] is in memory.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.kernels import attention_local, context
from moe_jax.kernels.autodiff import SAVED_BY_KERNEL
from moe_jax.kernels.mask import CAUSAL, Mask

_LANES = 128  # numbers in a row of a vector register; the kernel's blocks are multiples of 128


def splash_refuses(q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: jnp.dtype) -> str:
  """Returns why the kernel cannot take these sizes, or ""; see attention.AttentionKernel."""
  if q_shape[1] % _LANES:
    return f"a sequence of {q_shape[1]} tokens: its blocks are multiples of {_LANES}"
  return ""


def splash_attention(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGA: jax.Array,
  segments_BL: jax.Array,
  mask: Mask = CAUSAL,
  interpret: bool = False,
) -> jax.Array:
  """Returns y_BLHA; the other arguments are those of attention.reference_attention.

  Each of several devices computes its own sequences and heads.

  Args:
    interpret: whether Pallas interprets the kernel on a CPU, which is slow.
  """
  local = functools.partial(_attend, mask=mask._replace(sinks_H=None), interpret=interpret)
  return attention_local.on_each_device(local)(q_BLHA, k_BLGA, v_BLGA, segments_BL, mask.sinks_H)


def _attend(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGA: jax.Array,
  segments_BL: jax.Array,
  sinks_H: jax.Array | None,
  mask: Mask,
  interpret: bool,
) -> jax.Array:
  # Imported here, so that other platforms need neither have it nor wait for it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  L, H, A = q_BLHA.shape[1:]
  S, part = k_BLGA.shape[1], mask.context
  size = next(n for n in (512, 384, 256, _LANES) if L % n == 0)  # the largest that divides L
  # The masks are rules that the kernel evaluates; no [L, L] array is built.
  near = (mask.window - 1, 0)
  rule = splash.LocalMask((S, S), near, 0) if mask.window else splash.CausalMask((S, S))
  if part is not None:  # the mask of all parts, of which a device takes its own blocks of queries
    rule.q_sequence = context.order(S, part.parts)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([rule] * H),
    block_sizes=splash.BlockSizes(
      block_q=size,
      block_kv=size,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_q_dq=size,
      block_kv_dq=size,
    ),
    residual_checkpoint_name=SAVED_BY_KERNEL,
    attn_logits_soft_cap=mask.soft_cap or None,
    interpret=interpret,
    head_shards=1,
    q_seq_shards=part.parts if part is not None else 1,
  )
  if part is not None:
    kernel = jax.tree.map(functools.partial(_of_part, part=part), kernel)
  q_BHLA, k_BGLA, v_BGLA = (x.swapaxes(1, 2) for x in (q_BLHA * A**-0.5, k_BLGA, v_BLGA))
  of_each = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
  own_BL = part.segments_BL if part is not None else segments_BL
  segments = splash.SegmentIds(own_BL, segments_BL)
  y_BHLA = of_each(q_BHLA, k_BGLA, v_BGLA, segments, sinks_H)
  return y_BHLA.swapaxes(1, 2)


def _of_part(x: jax.Array, part: context.Part) -> jax.Array:
  """Returns a part of what a kernel knows of queries [L], or of blocks [1, queries, keys]."""
  axis = min(x.ndim - 1, 1)
  size = x.shape[axis] // part.parts
  return jax.lax.dynamic_slice_in_dim(x, part.number * size, size, axis)
