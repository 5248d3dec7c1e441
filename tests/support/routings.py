"""The routings of the grid tests, as config fields and in the terms of the oracle."""

import functools
import math
from typing import NamedTuple

import numpy as np

from moe_jax.config import MoE, Priority, Router, Score
from tests.support import oracle

B, L, D, E, F = 8, 9, 6, 8, 4

DEEPSEEK = dict(
  top_k=3, score=Score.SIGMOID, gate_scale=2.5, expert_groups=4, top_groups=2, bias_update_rate=1e-3
)
# name: config fields, capacity factor, routing group
ROUTINGS = {
  "switch": (dict(router=Router.SWITCH, top_k=1, renormalize=False), 1.3, 9),
  "mixtral": (dict(top_k=2), 0.9, 9),
  "raw-short-groups": (dict(top_k=3, renormalize=False), 0.7, 3),
  "softmax-bias": (dict(top_k=2, bias_update_rate=1e-3), 0.9, 9),
  "deepseek": (DEEPSEEK, 0.8, 9),
  "noisy": (dict(router=Router.NOISY_TOPK, top_k=2), 0.6, 9),
  "expert-choice": (dict(router=Router.EXPERT_CHOICE, top_k=2, renormalize=False), 0.9, 9),
  "sinkhorn": (dict(router=Router.SINKHORN, top_k=2), 0.7, 9),
  "hash": (dict(router=Router.HASH, top_k=1, renormalize=False), 1.0, 9),
  "random": (dict(router=Router.RANDOM, top_k=2, renormalize=False), 0.6, 9),
  "priority-choice": (dict(top_k=2, priority=Priority.CHOICE), 0.8, 9),
  "priority-score": (dict(top_k=2, priority=Priority.SCORE), 0.8, 9),
}


def moe_config(name: str, *, dropless: bool = False, **fields) -> MoE:
  """Returns a routing as a config; expert choice has a capacity with every dispatcher."""
  routing, factor, group = ROUTINGS[name]
  factor = math.inf if dropless and name != "expert-choice" else factor
  return MoE(
    num_experts=E,
    expert_dim=F,
    capacity_factor=factor,
    eval_capacity_factor=factor,
    group_size=group,
    **routing | fields,
  )


def spec(moe: MoE) -> oracle.Spec:
  return oracle.Spec(
    router="topk" if moe.router is Router.SWITCH else moe.router.value,
    top_k=moe.top_k,
    renormalize=moe.renormalize,
    score=moe.score.value,
    scale=moe.gate_scale,
    groups=moe.expert_groups,
    top_groups=moe.top_groups,
    priority=moe.priority.value,
    factor=moe.capacity_factor,
    group=moe.group_size,
    biased=bool(moe.bias_update_rate),
  )


@functools.cache
def inputs() -> tuple[oracle.Inputs, np.ndarray]:
  """Returns inputs and a cotangent, float32 values stored as float64.

  The router is as skewed as a learned one, and rows have padding.
  """
  rng = np.random.default_rng(0)
  offset_D = rng.normal(size=D)

  def float32(array):
    return np.float32(array).astype(np.float64)

  shapes = {"noise_DE": (D, E), "gate_EDF": (E, D, F), "up_EDF": (E, D, F), "down_EFD": (E, F, D)}
  x_BLD = rng.normal(size=(B, L, D)) + offset_D
  router_DE = 0.5 * rng.normal(size=(D, E)) + np.outer(offset_D, np.linspace(0.6, -0.2, E))
  weights = {"router_DE": router_DE} | {n: rng.normal(size=s) for n, s in shapes.items()}
  values = oracle.Inputs(
    x_BLD=float32(x_BLD),
    real_BL=np.arange(L)[None] < rng.integers(4, L + 1, B)[:, None],
    # Some ids are much more frequent than others, as in text.
    ids_BL=np.minimum(rng.geometric(0.25, (B, L)), 20).astype(np.int32),
    noise_BLE=float32(rng.normal(size=(B, L, E))),
    bias_E=float32(0.1 * rng.normal(size=E)),
    weights={n: float32(w) for n, w in weights.items()},
  )
  return values, float32(rng.normal(size=(B, L, D)))


class Expected(NamedTuple):
  """The oracle's answer."""

  assignments: list[tuple[int, int, bool]]  # token, expert, kept
  result: oracle.Result
  slopes: dict[str, list[oracle.Slope]]


@functools.cache
def expected(name: str, dropless: bool) -> Expected:
  values, cotangent_BLD = inputs()
  routing = spec(moe_config(name, dropless=dropless))
  assignments = oracle.select(values, routing)
  slopes = oracle.slopes(values, routing, assignments, cotangent_BLD)
  return Expected(assignments, oracle.evaluate(values, routing, assignments), slopes)
