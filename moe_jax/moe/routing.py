"""What a router gets, what it returns, and the record of all that is known about one.

Letters: T tokens of one routing group, except in `Routing`, where they may be those of a device;
N assignments.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from moe_jax import sharding
from moe_jax.config import MoE, Score


class LayerInputs(NamedTuple):
  """What the router of a layer reads."""

  logits_BLE: jax.Array  # float32
  real_BL: jax.Array  # bool, False at padding
  ids_BL: jax.Array  # int32 token ids
  bias_E: jax.Array  # float32 balancing bias: for the selection, not for gates
  noise_BLE: jax.Array | None = None  # float32, as RouterSpec.noise draws it
  # [B, L, ...], as RouterSpec.extra computes it
  extra: dict[str, jax.Array] = {}  # noqa: RUF012 (nobody writes to it)


class RouterInputs(NamedTuple):
  """The same of one routing group: what a router function reads."""

  logits_TE: jax.Array
  real_T: jax.Array
  ids_T: jax.Array
  bias_E: jax.Array
  noise_TE: jax.Array | None = None
  extra: dict[str, jax.Array] = {}  # noqa: RUF012 (nobody writes to it)


class Assignments(NamedTuple):
  """Which token goes to which expert, in order of priority: earlier assignments are kept first."""

  token_N: jax.Array  # int32, index of the token
  expert_N: jax.Array  # int32
  gate_N: jax.Array  # float32, weight of the expert's output; carries the router's gradient
  real_N: jax.Array  # bool, False for padding: takes no slot, counts nowhere


class Routing(NamedTuple):
  """What a router returns: assignments, and what losses and statistics need of each token."""

  token_N: jax.Array
  expert_N: jax.Array
  gate_N: jax.Array
  real_N: jax.Array
  probs_TE: jax.Array  # float32, each token's distribution over experts
  load_TE: jax.Array  # float32, differentiable chance to be chosen; 0 where a router has none

  @property
  def assignments(self) -> Assignments:
    return Assignments(self.token_N, self.expert_N, self.gate_N, self.real_N)


class Rule(NamedTuple):
  """What a router asks of another field of config.MoE."""

  field: str
  holds: Callable[[MoE], bool]
  why: str  # and what to do about it


Project = Callable[[jax.Array, jax.Array], jax.Array]  # (x_BLD, w_DE) -> float32 [B, L, E]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSpec:
  """All that is known about a router. `noise` and `extra` are for `function` alone."""

  # (RouterInputs, MoE) -> Routing of one group; with takes_capacity also capacity=C
  function: Callable[..., Routing]
  evaluation: Callable[..., Routing] | None = None  # in evaluation; None: the same function
  takes_capacity: bool = False  # the router fills the C places of each expert by itself
  fixed_choices: bool = True  # every token has K assignments
  # (key, (B, L, E)) -> float32 noise_BLE
  noise: Callable[[jax.Array, tuple[int, ...]], jax.Array] | None = None
  # Drawn by a token's place in the batch, so that generation cannot follow.
  noise_in_evaluation: bool = False
  parameters: tuple[sharding.Parameter, ...] = ()  # besides router_DE, which every router has
  # (float32 x_BLD, parameters by name, project) -> more inputs, [B, L, ...]
  extra: Callable[[jax.Array, Mapping[str, jax.Array], Project], dict[str, jax.Array]] | None = None
  looks_ahead: str = ""  # why an output depends on later tokens under `function`; "" if it does not
  scores: tuple[Score, ...] = (Score.SOFTMAX,)  # that it is defined for
  takes_bias: bool = False  # selects by score, so a balancing bias can change the selection
  takes_groups: bool = False  # can limit a token to `top_groups` of the groups of experts
  load_is_learned: bool = True  # gradients can change the load, so the balance loss makes sense
  has_load: bool = False  # load_TE is not 0, so that loss.load makes sense
  rules: tuple[Rule, ...] = ()
  papers: tuple[str, ...]  # arXiv numbers
  doc: str  # what docs/routing.md says

  def runs_own(self, *, train: bool) -> bool:
    """Whether `function` runs, in training or in evaluation."""
    return train or self.evaluation is None
