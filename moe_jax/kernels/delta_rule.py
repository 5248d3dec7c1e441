"""The gated delta rule (Gated DeltaNet, 2412.06464): attention with a state in place of a cache.

    S_t = a_t S_(t-1) + b_t k_t (v_t - a_t k_t^T S_(t-1))^T,    y_t = q_t^T S_t

The state S forgets by a_t = exp(decay), and what it holds under the key k_t moves to v_t by b_t. A
document begins with a state of zeros. `chunked` computes many tokens by matrix products of chunks
(the UT transform of 2406.06484), `step` one token; both in float32.

I: width of a head of keys. O: heads. X: width of a head of values. U: channels, C: width of the
convolution, W: the C - 1 inputs that it keeps. L: tokens, of a chunk inside of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_CHUNK = 64


class DeltaState(NamedTuple):
  """What a layer keeps of the tokens before."""

  memory_BOIX: jax.Array  # S, float32
  recent_BWU: jax.Array  # the last inputs of the convolution; 0 before a row's first token


class DeltaInputs(NamedTuple):
  """What the rule reads of each token, float32."""

  q_BLOI: jax.Array  # normed
  k_BLOI: jax.Array  # of length 1
  v_BLOX: jax.Array
  decay_BLO: jax.Array  # log a, at most 0
  beta_BLO: jax.Array


def convolve(
  x_BLU: jax.Array, weight_UC: jax.Array, segments_BL: jax.Array, recent_BWU: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the causal convolution of each channel within its document, and the inputs to keep.

  Args:
    x_BLU: inputs, with at least one token.
    weight_UC: the weights; the last of a channel is the token's own.
    segments_BL: int32, the document of each token. The first token goes on with `recent_BWU`.
    recent_BWU: the C - 1 inputs before.
  """
  L, before = x_BLU.shape[1], recent_BWU.shape[1]
  x_BSU = jnp.concatenate([recent_BWU, x_BLU], axis=1)
  first_BW = jnp.broadcast_to(segments_BL[:, :1], recent_BWU.shape[:2])
  segments_BS = jnp.concatenate([first_BW, segments_BL], axis=1)
  y_BLU = jnp.zeros_like(x_BLU)
  for tap in range(before + 1):
    same_BL1 = (segments_BS[:, tap : tap + L] == segments_BL)[..., None]
    y_BLU += jnp.where(same_BL1, x_BSU[:, tap : tap + L], 0) * weight_UC[None, None, :, tap]
  keep_BW1 = (segments_BS[:, L:] == segments_BL[:, -1:])[..., None]
  return y_BLU, jnp.where(keep_BW1, x_BSU[:, L:], 0)


def step(tokens: DeltaInputs, memory_BOIX: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns y_BLOX of one token (L = 1), and the state after it."""
  q_BOI, k_BOI, v_BOX, decay_BO, beta_BO = (x[:, 0] for x in tokens)
  memory_BOIX = memory_BOIX * jnp.exp(decay_BO)[..., None, None]
  known_BOX = jnp.einsum("BOI,BOIX->BOX", k_BOI, memory_BOIX)
  change_BOX = beta_BO[..., None] * (v_BOX - known_BOX)
  memory_BOIX += k_BOI[..., None] * change_BOX[..., None, :]
  return jnp.einsum("BOI,BOIX->BOX", q_BOI, memory_BOIX)[:, None], memory_BOIX


def chunked(
  tokens: DeltaInputs, segments_BL: jax.Array, memory_BOIX: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns y_BLOX, and the state after the last token.

  Args:
    tokens: what the rule reads.
    segments_BL: int32, the document of each token, adjacent ones of a document side by side. The
      first token goes on with the state.
    memory_BOIX: the state before.
  """
  B, length = segments_BL.shape
  size = min(_CHUNK, length)
  rest = -length % size

  def chunks(x: jax.Array) -> jax.Array:
    """[B, L, ...] to [chunks, B, size, ...]."""
    mode = "edge" if x.ndim == 2 else "constant"  # no new document; keys and betas of 0
    padded = jnp.pad(x, ((0, 0), (0, rest), *((0, 0),) * (x.ndim - 2)), mode)
    return padded.reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1)

  def body(
    carry: tuple[jax.Array, jax.Array], chunk: tuple[DeltaInputs, jax.Array]
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    memory_BOIX, before_B = carry
    (q_BLOI, k_BLOI, v_BLOX, decay_BLO, beta_BLO), segments_BL = chunk
    q_BOLI, k_BOLI, v_BOLX = (x.swapaxes(1, 2) for x in (q_BLOI, k_BLOI, v_BLOX))
    beta_BOL1 = beta_BLO.swapaxes(1, 2)[..., None]
    decay_BOL = decay_BLO.swapaxes(1, 2)
    # Decays from each token to each later one, summed: a difference of sums from the chunk's begin
    # would lose the digits of a small decay after large ones.
    later_LL = jnp.tril(jnp.ones(2 * decay_BOL.shape[-1:], bool), -1)
    sum_BOLL = jnp.cumsum(jnp.where(later_LL, decay_BOL[..., None], 0), axis=-2)
    same_BLL = segments_BL[:, :, None] == segments_BL[:, None]
    seen_B1LL = jnp.tril(same_BLL)[:, None]
    between_BOLL = _exp(sum_BOLL, seen_B1LL)
    goes_on_B1L = (segments_BL == before_B[:, None])[:, None]
    since_BOL1 = _exp(jnp.cumsum(decay_BOL, axis=-1), goes_on_B1L)[..., None]  # from the state
    until_BOL1 = between_BOLL[..., -1, :, None]  # to the next state
    # Every token changes what the tokens after it find: a triangular system of the changes.
    system_BOLL = jnp.einsum("BOLI,BOSI->BOLS", beta_BOL1 * k_BOLI, k_BOLI) * between_BOLL
    values = jnp.concatenate([beta_BOL1 * v_BOLX, beta_BOL1 * since_BOL1 * k_BOLI], axis=-1)
    solved = jax.lax.linalg.triangular_solve(
      jnp.tril(system_BOLL, -1), values, left_side=True, lower=True, unit_diagonal=True
    )
    X = v_BOLX.shape[-1]
    change_BOLX = solved[..., :X] - jnp.einsum("BOLI,BOIX->BOLX", solved[..., X:], memory_BOIX)
    scores_BOLL = jnp.einsum("BOLI,BOSI->BOLS", q_BOLI, k_BOLI) * between_BOLL
    y_BOLX = jnp.einsum("BOLI,BOIX->BOLX", since_BOL1 * q_BOLI, memory_BOIX)
    y_BOLX += jnp.einsum("BOLS,BOSX->BOLX", scores_BOLL, change_BOLX)
    memory_BOIX = memory_BOIX * since_BOL1[..., -1:, :]
    memory_BOIX += jnp.einsum("BOLI,BOLX->BOIX", until_BOL1 * k_BOLI, change_BOLX)
    return (memory_BOIX, segments_BL[:, -1]), y_BOLX.swapaxes(1, 2)

  cut = (jax.tree.map(chunks, tokens), chunks(segments_BL))
  (memory_BOIX, _), y = jax.lax.scan(body, (memory_BOIX, segments_BL[:, 0]), cut)
  y_BLOX = y.swapaxes(0, 1).reshape(B, -1, *y.shape[3:])[:, :length]
  return y_BLOX, memory_BOIX


def _exp(x: jax.Array, where: jax.Array) -> jax.Array:
  """Returns exp(x), and 0 elsewhere, where x may be too large for it."""
  return jnp.exp(jnp.where(where, x, -jnp.inf))
