"""Causal attention of grouped queries (2305.13245) over packed documents, and the kernels for it.

`reference_attention` defines attention. Every other kernel computes the same function for some
platform; `choose_attention` picks the kernel of a run.

R: query heads of one key/value head.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Attention
from moe_jax.kernels import attention_blocks, attention_cudnn, attention_splash, platform
from moe_jax.kernels.mask import CAUSAL, Mask

AttentionFunction = Callable[..., jax.Array]  # the arguments are those of `reference_attention`
Shape = tuple[int, ...]


def segment_attention(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGX: jax.Array | None,
  segments_BL: jax.Array,
  kernel: Attention,
  mask: Mask = CAUSAL,
) -> jax.Array:
  """Computes `reference_attention` with `kernel`, or another kernel if it refuses the sizes.

  The arguments are those of `reference_attention`, of the whole mesh; without v_BLGX the keys are
  the values.
  `auto` and a kernel that refuses take that of `choose_attention`.
  """
  v_BLGX = k_BLGA if v_BLGX is None else v_BLGX
  case = (q_BLHA.shape, k_BLGA.shape, q_BLHA.dtype, mask)
  if kernel is Attention.AUTO or ATTENTION_KERNELS[kernel].refuses(*case):
    kernel, _ = choose_attention(platform.name(), *case)
  return ATTENTION_KERNELS[kernel].function(q_BLHA, k_BLGA, v_BLGX, segments_BL, mask)


def reference_attention(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGX: jax.Array,
  segments_BL: jax.Array,
  mask: Mask = CAUSAL,
) -> jax.Array:
  """Returns y_BLHX, in which query l attends to the keys of its own document up to position l.

  With mask.context the queries are a part of the sequence, and S is longer than L.
  Scores are scaled by A^-0.5; scores and softmax are float32; the result has the dtype of v_BLGX.

  Args:
    q_BLHA: queries; each group of H/G consecutive heads shares a key/value head.
    k_BLGA: keys.
    v_BLGX: values, of the width of keys or less.
    segments_BL: int32, the document of each token, 1 to L; 0 is padding, which attends to padding.
    mask: which scores count, and what becomes of them.
  """
  B, L, H, A = q_BLHA.shape
  G = k_BLGA.shape[2]
  q_BLGRA = q_BLHA.reshape(B, L, G, H // G, A)
  scores_BGRLS = jnp.einsum(
    "BLGRA,BSGA->BGRLS", q_BLGRA, k_BLGA, preferred_element_type=jnp.float32
  )
  own_BL, index_S = segments_BL, jnp.arange(k_BLGA.shape[1])
  index_L = index_S
  if mask.context is not None:
    own_BL, index_L = mask.context.segments_BL, mask.context.places(jnp.arange(L), L)
  same_BLS = own_BL[:, :, None] == segments_BL[:, None, :]
  visible_BLS = same_BLS & mask.sees(index_L[:, None] - index_S[None])[None]
  scores_BGRLS = mask.capped(scores_BGRLS * A**-0.5)
  scores_BGRLS = jnp.where(visible_BLS[:, None, None], scores_BGRLS, -jnp.inf)
  if mask.sinks_H is not None:
    sinks_BGRL1 = jnp.broadcast_to(mask.sinks(1, G, H // G, 1, 1), (*scores_BGRLS.shape[:4], 1))
    scores_BGRLS = jnp.concatenate([scores_BGRLS, sinks_BGRL1], axis=-1)
  weights_BGRLS = jax.nn.softmax(scores_BGRLS)[..., : index_S.size].astype(v_BLGX.dtype)
  y_BLGRX = jnp.einsum(
    "BGRLS,BSGX->BLGRX", weights_BGRLS, v_BLGX, preferred_element_type=jnp.float32
  )
  return y_BLGRX.astype(v_BLGX.dtype).reshape(B, L, H, -1)


class AttentionKernel(NamedTuple):
  """One way to compute `reference_attention`."""

  function: AttentionFunction
  # (shape of q_BLHA, shape of k_BLGA, dtype) -> why the kernel cannot take them; "" if it can
  refuses_sizes: Callable[[Shape, Shape, jnp.dtype], str]
  platforms: tuple[str, ...]  # where the kernel runs
  tried_on: tuple[str, ...]  # where `auto` considers it
  takes: tuple[str, ...]  # the fields of Mask that it computes

  def refuses(self, q_shape: Shape, k_shape: Shape, dtype: jnp.dtype, mask: Mask) -> str:
    """Returns why the kernel cannot compute such attention, or ""."""
    if others := [name for name in mask.used() if name not in self.takes]:
      return f"{' and '.join(others)} of kernels.mask.Mask: it does not compute that"
    return self.refuses_sizes(q_shape, k_shape, dtype)


def _takes_all(q_shape: Shape, k_shape: Shape, dtype: jnp.dtype) -> str:
  return ""


_EVERYWHERE = ("cpu", "gpu", "tpu")
_WHOLE = ("window", "soft_cap", "sinks_H")  # the fields for whole sequences
ATTENTION_KERNELS: dict[Attention, AttentionKernel] = {
  Attention.REFERENCE: AttentionKernel(
    reference_attention, _takes_all, _EVERYWHERE, (), takes=Mask._fields
  ),
  Attention.BLOCKS: AttentionKernel(
    attention_blocks.blocks_attention, _takes_all, _EVERYWHERE, ("cpu",), takes=_WHOLE
  ),
  Attention.CUDNN: AttentionKernel(
    attention_cudnn.cudnn_attention,
    attention_cudnn.cudnn_refuses,
    ("gpu",),
    ("gpu",),
    takes=("window",),
  ),
  Attention.SPLASH: AttentionKernel(
    attention_splash.splash_attention,
    attention_splash.splash_refuses,
    ("tpu",),
    ("tpu",),
    takes=Mask._fields,
  ),
}


def choose_attention(
  platform: str,
  q_shape: Shape,
  k_shape: Shape,
  dtype: jnp.dtype,
  mask: Mask,
) -> tuple[Attention, str]:
  """Returns the kernel that `auto` stands for, and a line that names the kernel and the reason.

  Nothing is measured, because all processes and a resumed run must choose the same kernel.

  Args:
    platform: "cpu", "gpu" or "tpu".
    q_shape: of q_BLHA, of the whole mesh.
    k_shape: of k_BLGA, of the whole mesh.
    dtype: of q_BLHA and k_BLGA.
    mask: of `reference_attention`.
  """
  candidates = [name for name, kernel in ATTENTION_KERNELS.items() if platform in kernel.tried_on]
  if not candidates:
    return Attention.REFERENCE, f"reference, because no kernel is made for {platform}"
  case = (q_shape, k_shape, dtype, mask)
  reasons = {name: ATTENTION_KERNELS[name].refuses(*case) for name in candidates}
  for name, reason in reasons.items():
    if not reason:
      return name, name.value
  why = "; ".join(f"{name.value} refuses {reason}" for name, reason in reasons.items())
  return Attention.REFERENCE, f"reference, which holds [L, L] scores in memory, because {why}"
