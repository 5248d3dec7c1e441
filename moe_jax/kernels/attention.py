"""Causal attention of grouped queries (2305.13245) over packed documents, and the kernels for it.

`reference` says what attention is. Every other kernel computes the same function, for the platform
that its file's name tells; `choose` says which of them a run takes.

  R query heads of one key/value head
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Attention
from moe_jax.kernels import attention_blocks, attention_cudnn, attention_splash, platform

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Shape = tuple[int, ...]


def attention(
  q_BLHA: jax.Array,
  k_BLGA: jax.Array,
  v_BLGA: jax.Array,
  segments_BL: jax.Array,
  kernel: Attention,
) -> jax.Array:
  """`reference`, by the kernel named; by the one of `choose` if it is auto or refuses the sizes."""
  shapes = (q_BLHA.shape, k_BLGA.shape, q_BLHA.dtype)
  if kernel is Attention.AUTO or ATTENTION[kernel].refuses(*shapes):
    kernel, _ = choose(platform.name(), *shapes)
  return ATTENTION[kernel].function(q_BLHA, k_BLGA, v_BLGA, segments_BL)


def reference(
  q_BLHA: jax.Array, k_BLGA: jax.Array, v_BLGA: jax.Array, segments_BL: jax.Array
) -> jax.Array:
  """y_BLHA: query l sees the keys of its own document that are not later than l.

  Scores, scaled by A^-0.5, and softmax are float32; the result has the dtype of the values.

  Args:
    q_BLHA: queries; heads h of H/G in a row share a key/value head.
    k_BLGA: keys.
    v_BLGA: values.
    segments_BL: int32, the document of each token, 1 to L; 0 is padding, which sees padding only.
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

  function: Attend
  # (shape of q_BLHA, shape of k_BLGA, dtype) -> why the kernel cannot take them, or "".
  refuses: Callable[[Shape, Shape, jnp.dtype], str]
  platforms: tuple[str, ...]  # where it runs
  tried_on: tuple[str, ...]  # where `auto` considers it


def _takes_all(q_shape: Shape, k_shape: Shape, dtype: jnp.dtype) -> str:
  return ""


ATTENTION: dict[Attention, AttentionKernel] = {
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
  """(the kernel, a line that says so and why): what `auto` means here.

  Nothing is measured: several processes must choose the same, and a resumed run again.

  Args:
    platform: of the devices, as jax names it: cpu, gpu, tpu.
    q_shape: of q_BLHA, of all devices together.
    k_shape: of k_BLGA, likewise.
    dtype: of both.
  """
  own = [name for name, kernel in ATTENTION.items() if platform in kernel.tried_on]
  if not own:
    return Attention.REFERENCE, f"reference, as no kernel is for {platform}"
  reasons = {name: ATTENTION[name].refuses(q_shape, k_shape, dtype) for name in own}
  for name, reason in reasons.items():
    if not reason:
      return name, name.value
  why = "; ".join(f"{name.value} refuses {reason}" for name, reason in reasons.items())
  return Attention.REFERENCE, f"reference, which holds [L, L] scores in memory, as {why}"
