"""What balances the experts' load: losses of the statistics, and the update of the biases.

Letters: Z stacked layers, or any leading dimension.
"""

import jax
import jax.numpy as jnp


def balance_loss(routed_ZE: jax.Array, prob_ZE: jax.Array, tokens_Z: jax.Array) -> jax.Array:
  """Returns E * sum_e(f_e * P_e), float32 [Z] (Switch 2101.03961 eq. 4, GShard 2006.16668).

  f_e is expert e's share of the assignments before drops and carries no gradient; P_e is its mean
  probability. Uniform f and P give exactly 1 for every E and K; no tokens give 0.

  Args:
    routed_ZE: int32, assignments of each expert.
    prob_ZE: float32, sum of each expert's probability over the tokens.
    tokens_Z: int32, number of tokens.
  """
  routed_Z1 = jnp.maximum(jnp.sum(routed_ZE, axis=-1, keepdims=True), 1).astype(jnp.float32)
  share_ZE = routed_ZE.astype(jnp.float32) / routed_Z1
  mean_ZE = prob_ZE / jnp.maximum(tokens_Z, 1).astype(jnp.float32)[:, None]
  return routed_ZE.shape[-1] * jnp.sum(share_ZE * mean_ZE, axis=-1)


def cv_squared_plus_one(x_ZE: jax.Array) -> jax.Array:
  """Returns E * sum(x^2) / sum(x)^2, float32 [Z]: 1 + CV(x)^2 of 1701.06538 eq. 7.

  It is 1.0 if all entries of a row are equal, and 0.0, with no gradient, if all are 0.
  """
  # The gradient divides by the square of the total, which float32 has to hold.
  total_Z = jnp.maximum(jnp.sum(x_ZE, axis=-1), 1e-15)
  return x_ZE.shape[-1] * jnp.sum((x_ZE / total_Z[:, None]) ** 2, axis=-1)


def updated_bias(bias_ZE: jax.Array, routed_ZE: jax.Array, rate: float) -> jax.Array:
  """Returns the bias of loss-free balancing (2408.15664) after a step.

  The bias of an expert rises by `rate` if its load is below the mean, and falls by `rate` if it is
  above. Then the mean of each layer's biases is subtracted.

  Args:
    bias_ZE: float32; it is added to the scores by which experts are chosen, not to the gates.
    routed_ZE: int32, the assignments of the whole batch, of all devices and microbatches.
    rate: u of the paper, 1e-3 there; 0 leaves the bias as it is.
  """
  if not rate or not routed_ZE.size:
    return bias_ZE
  # The sign of total/E - load, in integers and without the product E * load, which could overflow:
  # total/E - load = (quotient - load) + remainder/E.
  quotient_Z1, remainder_Z1 = jnp.divmod(jnp.sum(routed_ZE, axis=1, keepdims=True), len(bias_ZE[0]))
  gap_ZE = quotient_Z1 - routed_ZE
  sign_ZE = jnp.where(gap_ZE != 0, jnp.sign(gap_ZE), jnp.sign(remainder_Z1))
  bias_ZE = bias_ZE + rate * sign_ZE.astype(jnp.float32)
  return bias_ZE - jnp.mean(bias_ZE, axis=1, keepdims=True)
