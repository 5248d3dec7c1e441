"""The MoE layer in float64 NumPy, and its gradients along random directions by differences.

It shares no code with the package, and computes the papers' formulas one token or one expert at a
time. `select` makes the assignments; `evaluate` computes the layer for given assignments, which is
a smooth function.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass
class Spec:
  """A routing in the terms of the papers."""

  router: str = "topk"
  top_k: int = 2
  renormalize: bool = True
  score: str = "softmax"
  scale: float = 1.0
  groups: int = 1
  top_groups: int = 1
  priority: str = "token"
  factor: float = math.inf  # nothing is dropped
  group: int = 0  # tokens of a routing group
  biased: bool = False


@dataclasses.dataclass
class Inputs:
  """The inputs and weights of a layer."""

  x_BLD: np.ndarray
  real_BL: np.ndarray
  ids_BL: np.ndarray
  noise_BLE: np.ndarray
  bias_E: np.ndarray
  weights: dict  # router_DE, noise_DE, gate_EDF, up_EDF, down_EFD


def silu(x):
  return x / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def scores(logits, spec):
  return softmax(logits) if spec.score == "softmax" else 1 / (1 + np.exp(-logits))


def routed_logits(x_TD, noise_TE, weights, spec):
  """Returns the logits, the logits of the selection, and the scale of the noise or None."""
  logits = x_TD @ weights["router_DE"]
  if spec.router != "noisy_topk":
    return logits, logits, None
  scale = np.log1p(np.exp(x_TD @ weights["noise_DE"])) + 0.01
  return logits, logits + noise_TE * scale, scale


def capacity(spec, num_experts):
  if spec.factor == math.inf:
    return spec.group
  return min(spec.group, math.ceil(round(spec.factor * spec.group * spec.top_k / num_experts, 9)))


def best(values, k):
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def choices_of_token(logits_E, score_E, token_id, noise_E, plan_E, bias_E, spec):
  E = len(logits_E)
  if spec.router == "hash":
    h = token_id * 0x9E3779B1 % 2**32
    h = (h ^ (h >> 15)) * 0x85EBCA77 % 2**32
    return [(h ^ (h >> 13)) % E]
  if spec.router == "random":
    return best(noise_E, spec.top_k)
  if spec.router == "sinkhorn":
    return best(plan_E, spec.top_k)
  choice_E = score_E + (bias_E if spec.biased else 0)
  allowed = range(E)
  if spec.groups > 1:
    size = E // spec.groups
    sums = [sum(sorted(choice_E[g * size : (g + 1) * size])[-2:]) for g in range(spec.groups)]
    allowed = [e for g in best(sums, spec.top_groups) for e in range(g * size, (g + 1) * size)]
  return sorted(allowed, key=lambda e: -choice_E[e])[: spec.top_k]


def sinkhorn_plan(logits_TE, real_T):
  """Scales columns to a sum of tokens/E and rows to 1 in turns, 16 times, over the real tokens."""
  plan = np.exp(logits_TE)
  for _ in range(16):
    plan = plan / plan[real_T].sum(axis=0) * (real_T.sum() / plan.shape[1])
    plan = plan / plan.sum(axis=1, keepdims=True)
  return plan


def select(inputs, spec):
  """Returns [(token, expert, kept)] of all groups; tokens are numbered over the batch."""
  D, E = inputs.weights["router_DE"].shape
  x_TD = inputs.x_BLD.reshape(-1, D)
  noise_TE = inputs.noise_BLE.reshape(-1, E)
  real_T, ids_T = inputs.real_BL.reshape(-1), inputs.ids_BL.reshape(-1)
  logits_TE, choosing_TE, _ = routed_logits(x_TD, noise_TE, inputs.weights, spec)
  score_TE = scores(choosing_TE, spec)
  slots, assignments = capacity(spec, E), []
  for start in range(0, len(x_TD), spec.group):
    tokens = [t for t in range(start, start + spec.group) if real_T[t]]
    if not tokens:
      continue
    if spec.router == "expert_choice":
      for e in range(E):
        assignments += [(t, e, True) for t in sorted(tokens, key=lambda t: -score_TE[t, e])[:slots]]
      continue
    part = slice(start, start + spec.group)
    plan = sinkhorn_plan(logits_TE[part], real_T[part]) if spec.router == "sinkhorn" else None
    queue = []
    for t in tokens:
      experts = choices_of_token(
        logits_TE[t],
        score_TE[t],
        int(ids_T[t]),
        noise_TE[t],
        plan[t - start] if plan is not None else None,
        inputs.bias_E,
        spec,
      )
      sure = max(score_TE[t, e] for e in experts)
      for rank, e in enumerate(experts):
        order = {"token": (t, rank), "choice": (rank, t), "score": (rank, -sure, t)}[spec.priority]
        queue.append((order, t, e))
    slots_used = np.zeros(E, int)
    for _, t, e in sorted(queue):
      assignments.append((t, e, bool(slots_used[e] < slots)))
      slots_used[e] += 1
  return assignments


@dataclasses.dataclass
class Result:
  """The output and the statistics of a layer."""

  y_BLD: np.ndarray
  tokens: int
  sequences: int
  routed_E: np.ndarray
  kept_E: np.ndarray
  kept_K: np.ndarray  # by rank of the choice
  routed_P: np.ndarray  # by eighth of the sequence
  kept_P: np.ndarray
  gate_kept: float
  gate_TE: np.ndarray  # before drops, 0 where not routed
  kept_TE: np.ndarray
  prob_E: np.ndarray
  importance_E: np.ndarray
  load_E: np.ndarray
  z: float
  entropy: float
  balance: float
  sequence_balance: float  # sum over the sequences


def one_balance(routed_E, prob_E, tokens):
  return len(routed_E) * float((routed_E / routed_E.sum() * prob_E / tokens).sum())


def cv_plus_one(x_E):
  return float(1 + x_E.var() / x_E.mean() ** 2)


def evaluate(inputs, spec, assignments):
  weights, real_T = inputs.weights, inputs.real_BL.reshape(-1)
  B, L, D = inputs.x_BLD.shape
  E = weights["router_DE"].shape[1]
  x_TD = inputs.x_BLD.reshape(-1, D)
  logits, choosing, scale = routed_logits(x_TD, inputs.noise_BLE.reshape(-1, E), weights, spec)
  score = scores(choosing, spec)
  probs = score / score.sum(axis=1, keepdims=True)
  token, expert, kept = (np.array(column) for column in zip(*assignments, strict=True))
  gate = score[token, expert]
  if spec.renormalize:
    total = np.zeros(B * L)
    np.add.at(total, token, gate)
    gate = gate / total[token]
  gate = spec.scale * gate

  x_ND = x_TD[token]
  y_TD = np.zeros((B * L, D))
  for e in range(E):
    rows = (expert == e) & kept
    h = silu(x_ND[rows] @ weights["gate_EDF"][e]) * (x_ND[rows] @ weights["up_EDF"][e])
    np.add.at(y_TD, token[rows], gate[rows, None] * (h @ weights["down_EFD"][e]))

  load_E = np.zeros(E)
  if spec.router == "noisy_topk":
    for t in np.flatnonzero(real_T):
      for e in range(E):
        others = sorted(np.delete(choosing[t], e))
        distance = (logits[t, e] - others[-spec.top_k]) / scale[t, e]
        load_E[e] += 0.5 * (1 + math.erf(distance / math.sqrt(2)))
  routed_BE = np.zeros((B, E), int)
  np.add.at(routed_BE, (token // L, expert), 1)
  # A token's assignments are in the order of its choices under every priority.
  rank = np.array([(token[:i] == t).sum() for i, t in enumerate(token)])
  if spec.router == "expert_choice":
    rank[:] = 0
  eighth = token % L * 8 // L
  gate_TE, kept_TE = np.zeros((B * L, E)), np.zeros((B * L, E), bool)
  gate_TE[token, expert], kept_TE[token, expert] = gate, kept
  prob_BE = np.where(real_T[:, None], probs, 0).reshape(B, L, E).sum(axis=1)
  tokens_B = inputs.real_BL.sum(axis=1)
  log_z = logits.max(axis=1) + np.log(np.exp(logits - logits.max(axis=1)[:, None]).sum(axis=1))
  return Result(
    y_BLD=y_TD.reshape(B, L, D),
    tokens=int(real_T.sum()),
    sequences=int((tokens_B > 0).sum()),
    routed_E=routed_BE.sum(axis=0),
    kept_E=np.bincount(expert[kept], minlength=E),
    kept_K=np.bincount(rank[kept], minlength=1 if spec.router == "expert_choice" else spec.top_k),
    routed_P=np.bincount(eighth, minlength=8),
    kept_P=np.bincount(eighth[kept], minlength=8),
    gate_kept=float(gate[kept].sum()),
    gate_TE=gate_TE,
    kept_TE=kept_TE,
    prob_E=prob_BE.sum(axis=0),
    importance_E=np.bincount(expert, weights=gate, minlength=E),
    load_E=load_E,
    z=float((log_z[real_T] ** 2).sum()),
    entropy=float(-(probs * np.log(probs))[real_T].sum()),
    balance=one_balance(routed_BE.sum(axis=0), prob_BE.sum(axis=0), real_T.sum()),
    sequence_balance=sum(one_balance(routed_BE[b], prob_BE[b], tokens_B[b]) for b in range(B)),
  )


def loss(inputs, spec, assignments, cotangent_BLD):
  """Returns a scalar that depends on every differentiable output of the layer."""
  r = evaluate(inputs, spec, assignments)
  total = (r.y_BLD * cotangent_BLD).sum() + 3 * r.balance + r.z / r.tokens
  total += 2 * r.sequence_balance / r.sequences + cv_plus_one(r.importance_E)
  return total + (cv_plus_one(r.load_E) if spec.router == "noisy_topk" else 0)


class Slope(NamedTuple):
  """How fast `loss` grows where all numbers of an array move at once, each by its own share."""

  shares: np.ndarray  # of the array's shape, random of order 1
  slope: float  # the sum of gradient * shares; its error is about 1e-6


def slopes(inputs, spec, assignments, cotangent_BLD):
  """Returns {name: five Slopes} of x_BLD and each weight, at fixed assignments."""
  rng, by_name = np.random.default_rng(4), {}
  for name, array in {"x_BLD": inputs.x_BLD, **inputs.weights}.items():
    by_name[name] = []
    for shares in rng.normal(size=(5, *array.shape)):
      high, low = (
        loss(_with(inputs, name, array + step * shares), spec, assignments, cotangent_BLD)
        for step in (1e-6, -1e-6)
      )
      by_name[name].append(Slope(shares, (high - low) / 2e-6))
  return by_name


def _with(inputs, name, array):
  if name == "x_BLD":
    return dataclasses.replace(inputs, x_BLD=array)
  return dataclasses.replace(inputs, weights=inputs.weights | {name: array})
