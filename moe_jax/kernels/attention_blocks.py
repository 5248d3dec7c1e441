"""Attention for XLA:CPU: blocks of queries, and no reduction over the last dimension.

R: query heads of one key/value head.
"""

import jax
import jax.numpy as jnp

from moe_jax.kernels.matmul import matmul


def attend(
  q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array, segments_BL: jax.Array
) -> jax.Array:
  """Returns y_BLHA; the arguments are those of attention.reference.

  Queries are cut into up to 8 blocks, and each block meets only the keys up to its own end. That is
  about half the work and memory of all queries with all keys.
  """
  B, L, H, A = q_BLHA.shape
  G = k_BLGA.shape[2]
  R = H // G
  q_BGRLA = q_BLHA.reshape(B, L, G, R, A).transpose(0, 2, 3, 1, 4) * A**-0.5
  k_BGAS, v_BGSA = k_BLGA.transpose(0, 2, 3, 1), v_BLGA.swapaxes(1, 2)
  blocks = max(n for n in range(1, 9) if L % n == 0 and (n == 1 or L // n >= 32))
  size = L // blocks
  out = []
  for end in range(size, L + 1, size):
    rows, keys = slice(end - size, end), slice(0, end)
    q_BGMA = q_BGRLA[:, :, :, rows].reshape(B, G, R * size, A)  # M: queries of all R heads
    scores_BGMS = matmul(q_BGMA, k_BGAS[..., keys], jnp.float32)
    scores_BGRLS = scores_BGMS.reshape(B, G, R, size, end)
    visible_BLS = _visible(segments_BL, rows, keys)
    scores_BGRLS = jnp.where(visible_BLS[:, None, None], scores_BGRLS, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(scores_BGRLS, axis=-1, keepdims=True))
    weights_BGRLS = jnp.exp(scores_BGRLS - highest).astype(v_BGSA.dtype)
    # The softmax is normalised after the product with V, and its sum is a product with ones:
    # XLA:CPU reduces over the last dimension slowly, and this leaves none in the backward pass.
    ones_S = jnp.ones((end,), weights_BGRLS.dtype)
    total_BGRL = jnp.einsum(
      "BGRLS,S->BGRL", weights_BGRLS, ones_S, preferred_element_type=jnp.float32
    )
    weights_BGMS = weights_BGRLS.reshape(scores_BGMS.shape)
    y_BGMA = matmul(weights_BGMS, v_BGSA[:, :, keys], jnp.float32)
    y_BGRLA = y_BGMA.reshape(B, G, R, size, A) / total_BGRL[..., None]
    out.append(y_BGRLA.astype(v_BGSA.dtype))
  return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, L, H, A)


def _visible(segments_BL: jax.Array, rows: slice, keys: slice) -> jax.Array:
  """Returns visible_BLS, bool: which of `keys` each query of `rows` attends to."""
  same_BLS = segments_BL[:, rows, None] == segments_BL[:, None, keys]
  index_L = jnp.arange(segments_BL.shape[1])
  return same_BLS & (index_L[rows, None] >= index_L[None, keys])[None]
