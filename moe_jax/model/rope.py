"""Rotary positions (2104.09864), on all or a part of a head's width, and their stretching."""

import math

import jax
import jax.numpy as jnp

from moe_jax.config import Model, RopeKind, RopeScaling


@jax.named_scope("rope")
def rope(x_BLHA: jax.Array, positions_BL: jax.Array, model: Model) -> jax.Array:
  """Rotates the pairs (i, i + W/2) of the first W dimensions of each head by position * frequency.

  W is the rotated width, model.rotated_width. With rope_interleaved the pairs are (2i, 2i + 1), and
  come out as (i, i + W/2), in queries and keys alike. Computes in float32 and returns the dtype of
  x_BLHA.
  """
  width = model.rotated_width
  positions = positions_BL[:, :, None, None].astype(jnp.float32)
  angle = positions * frequencies(model).reshape(1, 1, 1, -1)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  factor = attention_factor(model.rope_scaling)
  if factor != 1:
    sin, cos = factor * sin, factor * cos
  turning = x_BLHA if width == x_BLHA.shape[-1] else x_BLHA[..., :width]
  turning = turning.astype(jnp.float32)
  if model.rope_interleaved:
    first, second = turning[..., ::2], turning[..., 1::2]
  else:
    first, second = jnp.split(turning, 2, axis=-1)
  parts = [first * cos - second * sin, second * cos + first * sin]
  rotated = jnp.concatenate(parts, axis=-1).astype(x_BLHA.dtype)
  if width == x_BLHA.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x_BLHA[..., width:]], axis=-1)


def score_factor(scaling: RopeScaling) -> float:
  """Returns what scores are multiplied by beside the scale (DeepSeek-V2's YaRN)."""
  if scaling.kind is not RopeKind.YARN or not scaling.mscale_all_dim:
    return 1.0
  return (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1) ** 2


def attention_factor(scaling: RopeScaling) -> float:
  """Returns what sin and cos are multiplied by (2309.00071 eq. 22)."""
  if scaling.kind is not RopeKind.YARN:
    return 1.0
  return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def frequencies(model: Model) -> jax.Array:
  """Returns the angle per position of each pair, float32 [W / 2]: base^(-2i/W), stretched."""
  half = model.rotated_width // 2
  frequency = model.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  scaling = model.rope_scaling
  if scaling.kind is RopeKind.NONE:
    return frequency
  slow = frequency / scaling.factor
  kept = _kept(frequency, model)
  return slow * (1 - kept) + frequency * kept


def _kept(frequency: jax.Array, model: Model) -> jax.Array:
  """Returns how far each pair keeps its frequency: 1 does, 0 takes that of the longer text."""
  scaling = model.rope_scaling
  if scaling.kind is RopeKind.LINEAR:
    return jnp.zeros_like(frequency)
  if scaling.kind is RopeKind.LLAMA3:
    turns = scaling.original_length / (2 * math.pi) * frequency  # in a row of the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return jnp.clip((turns - low) / (high - low), 0, 1)
  width = 2 * len(frequency)

  def place(turns: float) -> float:
    """The dimension, of W, that turns so often in a row of the original length."""
    wavelength = scaling.original_length / (2 * math.pi * turns)
    return width * math.log(wavelength) / (2 * math.log(model.rope_base))

  low, high = place(scaling.beta_fast), place(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  ramp = (jnp.arange(len(frequency), dtype=jnp.float32) - low) / max(high - low, 1e-3)
  return 1 - jnp.clip(ramp, 0, 1)
