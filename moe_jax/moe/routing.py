"""The inputs of a router, its result, and the record that declares a router.

Letters: T tokens of one routing group, or, in the `Routing` that `routers.route` returns, of one
device; N assignments.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import MoE, Score


class Tokens(NamedTuple):
  """The id, the document and the position of each token of a batch."""

  ids_BL: jax.Array  # int32, below vocab_size
  segments_BL: jax.Array  # int32, the document of each token, from 1; 0 is padding
  positions_BL: jax.Array  # int32, position within the document

  @classmethod
  def of_batch(cls, batch: Any) -> "Tokens":
    """Returns the Tokens of a data.pipeline.Batch."""
    return cls(
      ids_BL=batch.tokens_BL, segments_BL=batch.segments_BL, positions_BL=batch.positions_BL
    )

  @property
  def real_BL(self) -> jax.Array:
    """bool, False at padding."""
    return self.segments_BL > 0


class Mode(NamedTuple):
  """How a layer runs; static."""

  train: bool  # whether to use the capacity factor, jitter and the router's function of training
  trace: bool = False  # whether to return the experts of each token too


class LayerInputs(NamedTuple):
  """What the router of a layer reads for a whole batch."""

  logits_BLE: jax.Array  # float32
  real_BL: jax.Array  # bool, False at padding
  ids_BL: jax.Array  # int32 token ids
  bias_E: jax.Array  # float32 balancing bias, added for the selection and not for the gates
  noise_BLE: jax.Array | None = None  # float32, drawn by RouterSpec.noise
  # arrays [B, L, ...] that RouterSpec.extra computes
  extra: dict[str, jax.Array] = {}  # noqa: RUF012 (nobody writes to it)


class RouterInputs(NamedTuple):
  """The LayerInputs of one routing group, which a router function reads."""

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
  """What a router returns: assignments, and each token's numbers for losses and statistics."""

  token_N: jax.Array
  expert_N: jax.Array
  gate_N: jax.Array
  real_N: jax.Array
  probs_TE: jax.Array  # float32, each token's distribution over experts
  load_TE: jax.Array  # float32, differentiable chance to be chosen; 0 if the router defines none

  @property
  def assignments(self) -> Assignments:
    """The assignments without the numbers of each token."""
    return Assignments(
      token_N=self.token_N, expert_N=self.expert_N, gate_N=self.gate_N, real_N=self.real_N
    )


class Rule(NamedTuple):
  """A condition that a router puts on another field of config.MoE."""

  field: str
  holds: Callable[[MoE], bool]
  why: str  # the reason and the remedy, for the error message


Project = Callable[[jax.Array, jax.Array], jax.Array]  # (x_BLD, w_DE) -> float32 [B, L, E]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSpec:
  """Declares a router to the layer, validation, the optimizer, the metrics and the docs.

  `noise` and `extra` are computed only where `function` runs, not for `evaluation`.
  """

  # (RouterInputs, MoE) -> Routing of one group; with takes_capacity also capacity=C
  function: Callable[..., Routing]
  evaluation: Callable[..., Routing] | None = None  # replaces `function` in evaluation, if not None
  takes_capacity: bool = False  # the router itself fills the C places of each expert
  fixed_choices: bool = True  # every token has K assignments
  # (key, (B, L, E)) -> float32 noise_BLE
  noise: Callable[[jax.Array, tuple[int, ...]], jax.Array] | None = None
  # Evaluation is random too, by a token's place in the batch, so text generation is refused.
  noise_in_evaluation: bool = False
  parameters: tuple[sharding.Parameter, ...] = ()  # besides router_DE, which every router has
  # (float32 x_BLD, parameters by name, project) -> arrays [B, L, ...] for RouterInputs.extra
  extra: Callable[[jax.Array, Mapping[str, jax.Array], Project], dict[str, jax.Array]] | None = None
  looks_ahead: str = ""  # why `function` lets an output depend on later tokens; "" if it does not
  scores: tuple[Score, ...] = (Score.SOFTMAX,)  # the values of MoE.score that the router allows
  takes_bias: bool = False  # selects by score, so a balancing bias can change the selection
  takes_groups: bool = False  # can limit a token to `top_groups` of the groups of experts
  load_is_learned: bool = True  # gradients can change the load, so the balance loss makes sense
  has_load: bool = False  # the router computes load_TE, so loss.load makes sense
  rules: tuple[Rule, ...] = ()
  papers: tuple[str, ...]  # arXiv numbers
  doc: str  # the router's text in docs/routing.md

  def runs_own(self, *, train: bool) -> bool:
    """Returns whether `function` runs, rather than `evaluation`."""
    return train or self.evaluation is None


def router_matrix(name: str, scale: float) -> sharding.Parameter:
  """Declares a [D, E] matrix of a router, replicated because it is small and all tokens need it."""

  def initial(rngs: nnx.Rngs, sizes: Mapping[str, int]) -> jax.Array:
    shape = (sizes["D"], sizes["E"])
    return scale * jax.random.normal(rngs.params(), shape) if scale else jnp.zeros(shape)

  return sharding.Parameter(
    name=name, initial=initial, replicated=True, decays=False, group="router"
  )


ROUTER_DE = router_matrix("router_DE", 0.02)
ROUTER_BIAS_E = sharding.Parameter(
  name="router_bias_E",
  initial=lambda rngs, sizes: jnp.zeros((sizes["E"],)),
  replicated=True,
  decays=False,
  group="router",
)
