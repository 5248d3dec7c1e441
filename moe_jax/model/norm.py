"""Root mean square norm (1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
  """The scale of a norm; `letters` are the shape letters of the dimensions that it scales.

  `offset`, 0 or 1, is added to the parameter, which begins at 1 - offset.
  """

  def __init__(self, letters: str, *sizes: int, offset: int = 0):
    self.name, self.offset = f"norm_{letters}", offset
    setattr(self, self.name, nnx.Param(jnp.zeros(sizes) if offset else jnp.ones(sizes)))

  def weights(self) -> jax.Array:
    """Returns the scale, float32."""
    scale = getattr(self, self.name)[...]
    return scale + self.offset if self.offset else scale


@jax.named_scope("norm")
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Returns x / sqrt(mean(x^2) + eps) * scale, with the mean over the dimensions of the scale.

  These are the last ones of x. Computes in float32 and returns the dtype of x.
  """
  square = jnp.square(x.astype(jnp.float32))
  axes = tuple(range(-scale.ndim, 0))
  inverse = jax.lax.rsqrt(jnp.mean(square, axis=axes, keepdims=True) + eps)
  scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
  return (x.astype(jnp.float32) * inverse * scale).astype(x.dtype)
