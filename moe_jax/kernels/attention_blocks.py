"""Attention for XLA:CPU: blocks of queries, and no reduction over the last dimension.

R: query heads of one key/value head.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.kernels.autodiff import SAVED_BY_KERNEL
from moe_jax.kernels.mask import CAUSAL, Mask


def blocks_attention(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGX: jax.Array,
  segments_BL: jax.Array,
  mask: Mask = CAUSAL,
) -> jax.Array:
  """Returns y_BLHX; the arguments are those of attention.reference_attention.

  Queries are cut into up to 8 blocks, and each block meets only the keys up to its own end, from
  the first that the window of its first query holds. That is about half the work and memory of all
  queries with all keys, and less with a window.
  """
  B, L, H, A = q_BLHA.shape
  G = k_BLGA.shape[2]
  q_BGRLA = q_BLHA.reshape(B, L, G, H // G, A).transpose(0, 2, 3, 1, 4) * A**-0.5
  k_BGSA, v_BGSX = k_BLGA.swapaxes(1, 2), v_BLGX.swapaxes(1, 2)
  blocks = max(n for n in range(1, 9) if L % n == 0 and (n == 1 or L // n >= 32))
  out, index_L = [], jnp.arange(L)
  for end in range(L // blocks, L + 1, L // blocks):
    rows = slice(end - L // blocks, end)
    keys = slice(max(rows.start - mask.window + 1, 0) if mask.window else 0, end)
    scores_BGRLS = jnp.einsum(
      "BGRLA,BGSA->BGRLS",
      q_BGRLA[:, :, :, rows],
      k_BGSA[:, :, keys],
      preferred_element_type=jnp.float32,
    )
    before_LS = index_L[rows, None] - index_L[None, keys]
    same_BLS = segments_BL[:, rows, None] == segments_BL[:, None, keys]
    visible_BLS = same_BLS & mask.sees(before_LS)[None]
    scores_BGRLS = jnp.where(visible_BLS[:, None, None], mask.capped(scores_BGRLS), -jnp.inf)
    highest = jnp.max(scores_BGRLS, axis=-1, keepdims=True)
    if mask.sinks_H is not None:
      sinks = mask.sinks(1, G, H // G, 1, 1)
      highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(highest)
    highest = checkpoint_name(highest, SAVED_BY_KERNEL)  # small, and slow to compute again
    weights_BGRLS = jnp.exp(scores_BGRLS - highest).astype(v_BGSX.dtype)
    # The softmax is normalised after the product with V, and its sum is a product with ones:
    # XLA:CPU reduces over the last dimension slowly, and this leaves none in the backward pass.
    ones_S = jnp.ones((keys.stop - keys.start,), weights_BGRLS.dtype)
    total_BGRL, y_BGRLX = (
      jnp.einsum(f"BGRLS,{v}", weights_BGRLS, values, preferred_element_type=jnp.float32)
      for v, values in (("S->BGRL", ones_S), ("BGSX->BGRLX", v_BGSX[:, :, keys]))
    )
    if mask.sinks_H is not None:
      total_BGRL += jnp.exp(sinks - highest)[..., 0]
    out.append((y_BGRLX / total_BGRL[..., None]).astype(v_BGSX.dtype))
  return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, L, H, -1)
