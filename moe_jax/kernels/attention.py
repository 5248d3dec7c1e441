"""Causal attention of grouped queries (2305.13245) over packed documents, and the kernels for it.

`reference` defines attention. Every other kernel computes the same function for some platform;
`choose` picks the kernel of a run.

R: query heads of one key/value head.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Attention
from moe_jax.kernels import attention_blocks, attention_cudnn, attention_splash, platform

AttentionFunction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Shape = tuple[int, ...]


def segment_attention(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGA: jax.Array,
  segments_BL: jax.Array,
  kernel: Attention,
) -> jax.Array:
  """Computes `reference` with `kernel`, or with that of `choose` if `kernel` refuses the sizes.

  The arguments are those of `reference`, of the whole mesh. `auto` also takes that of `choose`.
  """
  shapes = (q_BLHA.shape, k_BLGA.shape, q_BLHA.dtype)
  if kernel is Attention.AUTO or ATTENTION_KERNELS[kernel].refuses(*shapes):
    kernel, _ = choose(platform.name(), *shapes)
  return ATTENTION_KERNELS[kernel].function(q_BLHA, k_BLGA, v_BLGA, segments_BL)


def reference(
  q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array, segments_BL: jax.Array
) -> jax.Array:
  """Returns y_BLHA, in which query l attends to the keys of its own document up to position l.

  Scores are scaled by A^-0.5; scores and softmax are float32; the result has the dtype of v_BLGA.

  Args:
    q_BLHA: queries; each group of H/G consecutive heads shares a key/value head.
    k_BLGA: keys.
    v_BLGA: values.
    segments_BL: int32, the document of each token, 1 to L; 0 is padding, which attends to padding.
  """
  B, L, H, A = q_BLHA.shape
  G = k_BLGA.shape[2]
  q_BLGRA = q_BLHA.reshape(B, L, G, H // G, A)
  scores_BGRLS = jnp.einsum(
    "BLGRA,BSGA->BGRLS", q_BLGRA, k_BLGA, preferred_element_type=jnp.float32
  )
  same_BLS = segments_BL[:, :, None] == segments_BL[:, None, :]
  visible_BLS = same_BLS & jnp.tril(jnp.ones((L, L), bool))[None]
  scores_BGRLS = jnp.where(visible_BLS[:, None, None], scores_BGRLS * A**-0.5, -jnp.inf)
  weights_BGRLS = jax.nn.softmax(scores_BGRLS).astype(v_BLGA.dtype)
  y_BLGRA = jnp.einsum(
    "BGRLS,BSGA->BLGRA", weights_BGRLS, v_BLGA, preferred_element_type=jnp.float32
  )
  return y_BLGRA.astype(v_BLGA.dtype).reshape(B, L, H, A)


class AttentionKernel(NamedTuple):
  """One way to compute `reference`."""

  function: AttentionFunction
  # (shape of q_BLHA, shape of k_BLGA, dtype) -> why the kernel cannot take them; "" if it can
  refuses: Callable[[Shape, Shape, jnp.dtype], str]
  platforms: tuple[str, ...]  # where the kernel runs
  tried_on: tuple[str, ...]  # where `auto` considers it


def _takes_all(q_shape: Shape, k_shape: Shape, dtype: jnp.dtype) -> str:
  return ""


ATTENTION_KERNELS: dict[Attention, AttentionKernel] = {
  Attention.REFERENCE: AttentionKernel(reference, _takes_all, ("cpu", "gpu", "tpu"), ()),
  Attention.BLOCKS: AttentionKernel(
    attention_blocks.attend, _takes_all, ("cpu", "gpu", "tpu"), ("cpu",)
  ),
  Attention.CUDNN: AttentionKernel(
    attention_cudnn.attend, attention_cudnn.refuses, ("gpu",), ("gpu",)
  ),
  Attention.SPLASH: AttentionKernel(
    attention_splash.attend, attention_splash.refuses, ("tpu",), ("tpu",)
  ),
}


def choose(
  platform: str, q_shape: Shape, k_shape: Shape, dtype: jnp.dtype
) -> tuple[Attention, str]:
  """Returns the kernel that `auto` stands for, and a line that names the kernel and the reason.

  Nothing is measured, because all processes and a resumed run must choose the same kernel.

  Args:
    platform: "cpu", "gpu" or "tpu".
    q_shape: of q_BLHA, of the whole mesh.
    k_shape: of k_BLGA, of the whole mesh.
    dtype: of q_BLHA and k_BLGA.
  """
  candidates = [name for name, kernel in ATTENTION_KERNELS.items() if platform in kernel.tried_on]
  if not candidates:
    return Attention.REFERENCE, f"reference, because no kernel is made for {platform}"
  reasons = {name: ATTENTION_KERNELS[name].refuses(q_shape, k_shape, dtype) for name in candidates}
  for name, reason in reasons.items():
    if not reason:
      return name, name.value
  why = "; ".join(f"{name.value} refuses {reason}" for name, reason in reasons.items())
  return Attention.REFERENCE, f"reference, which holds [L, L] scores in memory, because {why}"
