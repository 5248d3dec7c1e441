"""The MoE layer in float64 NumPy, token by token, and its gradients by central differences.

Shares no code with the package: what it computes is what the papers say.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Result:
  y_BLD: np.ndarray
  routed_E: np.ndarray
  kept_E: np.ndarray
  prob_E: np.ndarray
  z: float
  entropy: float
  tokens: int
  dropped: set  # (sequence, position, expert)
  balance: float


def silu(x):
  return x / (1 + np.exp(-x))


def moe_layer(x_BLD, real_BL, weights, *, top_k, renormalize, factor, group):
  """weights: router_DE, gate_EDF, up_EDF, down_EFD. factor 0: nothing is dropped."""
  router_DE, gate_EDF, up_EDF, down_EFD = weights
  B, L, D = x_BLD.shape
  E = router_DE.shape[1]
  capacity = int(np.ceil(factor * group * top_k / E)) if factor else group
  y_TD = np.zeros((B * L, D))
  routed, kept, prob = np.zeros(E, int), np.zeros(E, int), np.zeros(E)
  z = entropy = 0.0
  dropped = set()
  taken = None
  for t, (x_D, real) in enumerate(zip(x_BLD.reshape(-1, D), real_BL.reshape(-1), strict=True)):
    if t % group == 0:
      taken = np.zeros(E, int)
    if not real:
      continue
    logits_E = x_D @ router_DE
    probs_E = np.exp(logits_E - logits_E.max())
    probs_E /= probs_E.sum()
    prob += probs_E
    z += (logits_E.max() + np.log(np.exp(logits_E - logits_E.max()).sum())) ** 2
    entropy -= (probs_E * np.log(probs_E)).sum()
    chosen = sorted(range(E), key=lambda e: -probs_E[e])[:top_k]
    gates = np.array([probs_E[e] for e in chosen])
    if renormalize:
      gates = gates / gates.sum()
    for e, gate in zip(chosen, gates, strict=True):
      routed[e] += 1
      if taken[e] == capacity:
        dropped.add((t // L, t % L, e))
        continue
      taken[e] += 1
      kept[e] += 1
      hidden = silu(x_D @ gate_EDF[e]) * (x_D @ up_EDF[e])
      y_TD[t] += gate * (hidden @ down_EFD[e])
  tokens = int(real_BL.sum())
  balance = E * float((routed / (tokens * top_k) * prob / tokens).sum())
  return Result(y_TD.reshape(B, L, D), routed, kept, prob, z, entropy, tokens, dropped, balance)


def loss(x_BLD, real_BL, weights, cotangent_BLD, **options):
  """A scalar through every differentiable output: y, the balance loss and the router z-loss."""
  result = moe_layer(x_BLD, real_BL, weights, **options)
  return (result.y_BLD * cotangent_BLD).sum() + 3 * result.balance + result.z / result.tokens


def gradients(x_BLD, real_BL, weights, cotangent_BLD, **options):
  """Of `loss` by x_BLD and each weight, to about 1e-8."""
  arrays = [np.array(a, np.float64) for a in (x_BLD, *weights)]
  grads = []
  for array in arrays:
    grad = np.zeros_like(array)
    for index in np.ndindex(array.shape):
      value, values = array[index], []
      for step in (1e-5, -1e-5):
        array[index] = value + step
        values.append(loss(arrays[0], real_BL, arrays[1:], cotangent_BLD, **options))
      array[index] = value
      grad[index] = (values[0] - values[1]) / 2e-5
    grads.append(grad)
  return grads
