"""Attention for NVIDIA: cuDNN's flash kernel, through jax.nn.dot_product_attention.

cuDNN knows causal order and grouped queries, but takes documents in one of two forms that do not
serve here. A mask or a bias is an [L, L] array. A packed layout (offsets of each document) is in no
public function of jax, needs a limit for the documents of a row, and allocates its statistics for
each of those many again. So the documents become part of the product of query and key instead:
each head is longer by a code of its token's document, whose product is 0 for the same document and
far below any score for another. The backward pass needs nothing of its own.

  P numbers of the code, 4 for each digit
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.kernels import attention_local

_FAR = 10_000.0  # exp(-_FAR + any score) is 0 in float32
_RADIX = 4


def refuses(q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: jnp.dtype) -> str:
  """See attention.AttentionKernel."""
  _, L, _, A = q_shape
  longest = _longest_head()
  if dtype != jnp.bfloat16:
    return f"{jnp.dtype(dtype).name}: it computes in bfloat16"
  if A % 8:
    return f"head_dim={A}: it takes multiples of 8"
  if A + _code_size(L) > longest:
    return f"head_dim={A}: with {_code_size(L)} numbers for the document, {longest} at most"
  return ""


def attend(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGA: jax.Array,
  segments_BL: jax.Array,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """y_BLHA; see attention.reference. Several devices: each its own sequences and heads.

  Heads grow by the code: at 4,096 tokens and head_dim 128 by 24 of 128, and so does the work.

  Args:
    implementation: `xla` computes the same on any platform, with [L, L] scores.
  """
  local = functools.partial(_attend, implementation=implementation)
  return attention_local.on_each_device(local)(q_BLHA, k_BLGA, v_BLGA, segments_BL)


def _attend(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGA: jax.Array,
  segments_BL: jax.Array,
  implementation: Literal["cudnn", "xla"],
) -> jax.Array:
  A = q_BLHA.shape[-1]
  is_digit_BLP = _code(segments_BL)
  far = _FAR * A**0.5  # the scores are scaled afterwards

  def append(x_BLHA: jax.Array, code_BLP: jax.Array) -> jax.Array:
    code_BLHP = jnp.broadcast_to(code_BLP[:, :, None], x_BLHA.shape[:3] + code_BLP.shape[2:])
    return jnp.concatenate([x_BLHA, code_BLHP.astype(x_BLHA.dtype)], axis=-1)

  y_BLHA = jax.nn.dot_product_attention(
    append(q_BLHA, is_digit_BLP),
    append(k_BLGA, jnp.where(is_digit_BLP, 0.0, -far)),
    append(v_BLGA, jnp.zeros_like(is_digit_BLP)),  # cuDNN wants values as long as keys
    scale=A**-0.5, is_causal=True, implementation=implementation,
  )  # fmt: skip
  return y_BLHA[..., :A]


def _code(segments_BL: jax.Array) -> jax.Array:
  """is_digit_BLP, bool: for each digit of the document's number, which of 0 to 3 it is."""
  digits = _code_size(segments_BL.shape[1]) // _RADIX
  place = _RADIX ** jnp.arange(digits, dtype=segments_BL.dtype)
  digit = segments_BL[:, :, None] // place[None, None] % _RADIX
  return jax.nn.one_hot(digit, _RADIX, dtype=bool).reshape(*segments_BL.shape, -1)


def _code_size(L: int) -> int:
  """P: enough digits for L different documents, and a multiple of 8, as a head's length is."""
  digits = 2
  while _RADIX**digits < L:
    digits += 2
  return digits * _RADIX


def _longest_head() -> int:
  """That cuDNN takes backward, on the device that is here; on a Hopper GPU where none is."""
  device = jax.local_devices()[0]
  capability = float(getattr(device, "compute_capability", None) or 9.0)
  return 256 if 9.0 <= capability < 10.0 else 128
