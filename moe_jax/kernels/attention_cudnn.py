"""Attention for NVIDIA: cuDNN's flash kernel, through jax.nn.dot_product_attention.

cuDNN supports causal order and grouped queries, but takes documents only in two forms that do not
fit here. A mask or a bias is an [L, L] array. A packed layout (offsets of each document) is in no
public function of jax, needs a limit for the number of documents in a row, and allocates its
statistics once for each document up to that limit. Therefore each head is extended by numbers that
encode its token's document: their product of query and key is 0 within one document and far below
any score between two. The backward pass needs no change.

P: numbers of the code, 4 for each digit of the document's number.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.kernels import attention_local
from moe_jax.kernels.mask import CAUSAL, Mask

_FAR = 10_000.0  # exp(-_FAR + any score) is 0 in float32
_RADIX = 4


def cudnn_refuses(q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: jnp.dtype) -> str:
  """Returns why the kernel cannot take these sizes, or ""; see attention.AttentionKernel."""
  _, L, _, A = q_shape
  longest = _longest_head()
  if dtype != jnp.bfloat16:
    return f"{jnp.dtype(dtype).name}: it computes in bfloat16"
  if A % 8:
    return f"head_dim={A}: it takes multiples of 8"
  if A + _code_size(L) > longest:
    size = _code_size(L)
    return f"head_dim={A}: it takes {longest}, of which {size} numbers encode the document"
  return ""


def cudnn_attention(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGA: jax.Array,
  segments_BL: jax.Array,
  mask: Mask = CAUSAL,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """Returns y_BLHA; the other arguments are those of attention.reference_attention.

  The document's code makes heads longer and adds work: at 4,096 tokens, 24 numbers to a head_dim of
  128. Each of several devices computes its own sequences and heads.

  Args:
    implementation: "xla" computes the same function on any platform, with [L, L] scores.
  """
  local = functools.partial(_attend, mask=mask, implementation=implementation)
  return attention_local.on_each_device(local)(q_BLHA, k_BLGA, v_BLGA, segments_BL, None)


def _attend(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGA: jax.Array,
  segments_BL: jax.Array,
  sinks_H: None,
  mask: Mask,
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
    append(v_BLGA, jnp.zeros_like(is_digit_BLP)),  # cuDNN needs values as long as keys
    scale=A**-0.5,
    is_causal=True,
    local_window_size=(mask.window - 1, 0) if mask.window else None,
    implementation=implementation,
  )
  return y_BLHA[..., :A]


def _code(segments_BL: jax.Array) -> jax.Array:
  """Returns is_digit_BLP, bool: each base-4 digit of the document's number as a one-hot of 4."""
  digits = _code_size(segments_BL.shape[1]) // _RADIX
  place = _RADIX ** jnp.arange(digits, dtype=segments_BL.dtype)
  digit = segments_BL[:, :, None] // place[None, None] % _RADIX
  return jax.nn.one_hot(digit, _RADIX, dtype=bool).reshape(*segments_BL.shape, -1)


def _code_size(L: int) -> int:
  """Returns P, which has digits for L documents and is a multiple of 8, as a head's length is."""
  digits = 2
  while _RADIX**digits < L:
    digits += 2
  return digits * _RADIX


def _longest_head() -> int:
  """Returns the longest head whose gradient cuDNN computes on this device.

  Without a GPU, the answer is that of a Hopper GPU.
  """
  device = jax.local_devices()[0]
  capability = float(getattr(device, "compute_capability", None) or 9.0)
  return 256 if 9.0 <= capability < 10.0 else 128
