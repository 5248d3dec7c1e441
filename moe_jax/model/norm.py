"""Root mean square norm (1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
  """The scale of a norm; `letter` is the shape letter of the dimension that it scales."""

  def __init__(self, letter: str, size: int):
    self.name = f"norm_{letter}"
    setattr(self, self.name, nnx.Param(jnp.ones((size,))))

  def weights(self) -> jax.Array:
    """Returns the scale, float32."""
    return getattr(self, self.name)[...]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Returns x / sqrt(mean(x^2) + eps) * scale, with the mean over the last dimension.

  Computes in float32 and returns the dtype of x.
  """
  square = jnp.square(x.astype(jnp.float32))
  inverse = jax.lax.rsqrt(jnp.mean(square, axis=-1, keepdims=True) + eps)
  scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
  return (x.astype(jnp.float32) * inverse * scale).astype(x.dtype)
