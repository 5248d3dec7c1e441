"""The MoE layer of each dispatcher against a dense FFN of the same active FLOPs, on one device.

A grid is a list of `Setting`s; the candidates of one setting take turns. A program is compared with
the dense oracle before it is timed. Weights are in the compute dtype already, as they are for all
but the first use in a step. Seconds are by the clock, of forward and of forward and backward.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import phases
from benchmarks.results import progress
from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.config import Dispatch, Dtype, UserError
from moe_jax.model.feedforward import DenseFFN, MoEFFN
from moe_jax.training import metrics, timing


class Setting(NamedTuple):
  """One D, F, K and number of tokens, with as many numbers of experts as are to be compared."""

  dim: int
  expert_dim: int
  top_k: int
  experts: tuple[int, ...]
  rows: int  # B; capacity is counted in each row by itself
  seq_len: int  # L
  dtype: Dtype = Dtype.FLOAT32
  oracles: bool = False  # einsum and dense too, with the fewest experts
  phases: bool = False  # split the time, with the fewest experts

  @property
  def name(self) -> str:
    tokens = self.rows * self.seq_len
    return f"D={self.dim} F={self.expert_dim} K={self.top_k} T={tokens} {self.dtype.value}"


CPU_GRID = [
  Setting(256, 512, 1, (8, 16, 64), 16, 256, oracles=True),
  Setting(256, 512, 2, (8, 16, 64), 16, 256, oracles=True),
  Setting(256, 512, 8, (8, 16, 64), 16, 256),
  Setting(512, 1024, 2, (8, 64), 16, 256, phases=True),
]
ACCELERATOR_GRID = [
  Setting(dim, expert_dim, top_k, (experts,), tokens // 4096, 4096, Dtype.BFLOAT16, phases=True)
  for dim, expert_dim, experts, top_k in ((4096, 14336, 8, 2), (2048, 1024, 64, 8))
  for tokens in (8192, 16384, 32768, 65536)
]


class Arrays(NamedTuple):
  """What a candidate is called with."""

  params: Any
  x_BLD: jax.Array
  real_BL: jax.Array
  dy_BLD: jax.Array


class Candidate(NamedTuple):
  name: str
  moe: config_lib.MoE | None  # None: the dense FFN
  graph: Any
  forward: Callable[..., Any]  # (*Arrays) -> (y_BLD, MoeStats or None)
  step: Callable[..., Any]  # (*Arrays) -> (y_BLD, MoeStats or None, (dparams, dx_BLD))
  arrays: Arrays


def make_moe(setting: Setting, dispatch: Dispatch, experts: int) -> config_lib.MoE:
  return config_lib.MoE(
    num_experts=experts, top_k=setting.top_k, expert_dim=setting.expert_dim, dispatch=dispatch,
    capacity_factor=1.0,
  )  # fmt: skip


def _programs(graph: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
  def forward(params, x_BLD, real_BL, dy_BLD):
    layer = nnx.merge(graph, params)
    if isinstance(layer, DenseFFN):
      return layer(x_BLD), None
    bias_E, ids_BL = jnp.zeros(layer.moe.num_experts), jnp.zeros(real_BL.shape, jnp.int32)
    return layer(x_BLD, real_BL, ids_BL, bias_E, jax.random.key(0), train=True)[:2]

  def step(params, x_BLD, real_BL, dy_BLD):
    run = functools.partial(forward, real_BL=real_BL, dy_BLD=None)
    y_BLD, vjp, stats = jax.vjp(run, params, x_BLD, has_aux=True)
    return y_BLD, stats, vjp(dy_BLD)

  return jax.jit(forward), jax.jit(step)


def _init(model: config_lib.Model, experts: int, ffn_dim: int) -> tuple[Any, Any]:
  """(graph, weights on the device) of an MoE layer, or of a dense FFN for experts=0."""

  def make(key):
    rngs = nnx.Rngs(key)
    layer = MoEFFN(model, rngs) if experts else DenseFFN(model, ffn_dim, rngs)
    if experts:  # a router as it is after some training: logits of deviation 1
      layer.router_DE[...] = layer.router_DE[...] * (50 * model.dim**-0.5)
    return layer

  def weights(key):
    dtype = jnp.dtype(model.compute_dtype.value)

    def cast(path, w):
      return w if "router_DE" in jax.tree_util.keystr(path) else w.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, nnx.state(make(key), nnx.Param))

  key = jax.random.key(0)
  graph, _ = nnx.split(nnx.eval_shape(lambda: make(key)))
  return graph, jax.jit(weights)(key)


def _inputs(setting: Setting) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x_BLD, real_BL, dy_BLD; tokens share a direction, as hidden states do: uneven loads."""

  def make(key):
    shape = (setting.rows, setting.seq_len, setting.dim)
    own, shared, dy = jax.random.split(key, 3)
    x_BLD = 0.98 * jax.random.normal(own, shape) + 0.2 * jax.random.normal(shared, (1, 1, shape[2]))
    arrays = x_BLD, jax.random.normal(dy, shape)
    return tuple(a.astype(setting.dtype.value) for a in arrays)

  x_BLD, dy_BLD = jax.jit(make)(jax.random.key(1))
  return x_BLD, jnp.ones(x_BLD.shape[:2], bool), dy_BLD


def candidates(setting: Setting) -> Iterator[Candidate]:
  """The dense FFN first, then every dispatcher with every number of experts."""
  x_BLD, real_BL, dy_BLD = _inputs(setting)
  model = config_lib.Model(dim=setting.dim, compute_dtype=setting.dtype)
  graph, params = _init(model, 0, setting.top_k * setting.expert_dim)
  yield Candidate("ffn", None, graph, *_programs(graph), Arrays(params, x_BLD, real_BL, dy_BLD))
  for experts in setting.experts:
    how = [Dispatch.GATHER, Dispatch.GROUPED]
    if setting.oracles and experts == min(setting.experts):
      how += [Dispatch.EINSUM, Dispatch.DENSE]
    params = None
    for dispatch in how:
      moe = make_moe(setting, dispatch, experts)
      graph, fresh = _init(dataclasses.replace(model, moe=moe), experts, 0)
      params = params or fresh  # one copy for all: the weights do not depend on the dispatcher
      arrays = Arrays(params, x_BLD, real_BL, dy_BLD)
      yield Candidate(f"{dispatch.value} E={experts}", moe, graph, *_programs(graph), arrays)


def check(
  setting: Setting, candidate: Candidate, oracles: dict[int, Any], tokens: int = 64
) -> float:
  """Error against the dense oracle, relative to its scale; a UserError if it is too large.

  Some tokens, spread over all, carry all the gradient. A grouped program is the one to be timed, on
  all its tokens; one with a capacity is built for these tokens with a slot for each.

  Args:
    setting: of the candidate.
    candidate: the dense FFN is right by definition.
    oracles: by number of experts; filled here, so that candidates share an oracle.
    tokens: about how many to compare.
  """
  if candidate.moe is None:
    return 0.0
  arrays, E = candidate.arrays, candidate.moe.num_experts
  every = max(1, setting.rows * setting.seq_len // tokens)
  some = functools.partial(_some, every=every)
  few = Arrays(arrays.params, *map(some, arrays[1:]))

  def small(dispatch):
    moe = dataclasses.replace(candidate.moe, dispatch=dispatch, capacity_factor=math.inf)
    model = config_lib.Model(dim=setting.dim, compute_dtype=setting.dtype, moe=moe)
    layer = nnx.eval_shape(lambda: MoEFFN(model, nnx.Rngs(0)))
    return _programs(nnx.split(layer)[0])[1](*few)

  if E not in oracles:
    oracles[E] = small(Dispatch.DENSE)
  if candidate.moe.dispatch is Dispatch.GROUPED:
    masked = arrays._replace(dy_BLD=_only_some(arrays.dy_BLD, every))
    y, stats, (dparams, dx) = candidate.step(*masked)
    found = some(y), stats, (dparams, some(dx))
  else:
    found = small(candidate.moe.dispatch)
  # Sums in another order: 1e-6 in float32 here; bfloat16 rounds each of them to 4e-3.
  limit = 1e-4 if setting.dtype is Dtype.FLOAT32 else 5e-2
  errors = jax.tree.map(_error, (found[0], found[2]), (oracles[E][0], oracles[E][2]))
  worst = max(map(float, jax.tree.leaves(errors)))
  if not worst <= limit:  # NaN included
    raise UserError(
      f"{setting.name} {candidate.name}: output or gradients differ from the dense oracle by "
      f"{worst:.1e} of their scale, more than {limit:.0e}; wrong programs are not timed"
    )
  return worst


@functools.partial(jax.jit, static_argnames="every")
def _some(x_BLD, every):
  """Every so many tokens, as one row."""
  return x_BLD.reshape(1, -1, *x_BLD.shape[2:])[:, ::every]


@functools.partial(jax.jit, static_argnames="every")
def _only_some(x_BLD, every):
  """Zeros at all other tokens."""
  x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
  return jnp.where(jnp.arange(len(x_TD))[:, None] % every == 0, x_TD, 0).reshape(x_BLD.shape)


@jax.jit
def _error(x, want):
  x, want = x.astype(jnp.float32), want.astype(jnp.float32)
  # The root of the mean square: single elements of a bfloat16 sum can be off by more.
  return jnp.sqrt(jnp.mean((x - want) ** 2) / jnp.maximum(jnp.mean(want**2), 1e-30))


def _matmul(setting: Setting) -> Callable[[], jax.Array]:
  """One dense matmul of the layer's forward FLOPs."""
  T, D, F = setting.rows * setting.seq_len, setting.dim, 3 * setting.top_k * setting.expert_dim
  dtype = setting.dtype.value
  x_TD, w_DF = (jax.random.normal(jax.random.key(2), s, dtype) for s in ((T, D), (D, F)))
  return functools.partial(jax.jit(jnp.dot), x_TD, w_DF)


def run_setting(
  setting: Setting, rounds: int, min_seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """(a row for each candidate, a row for each split into phases) of one setting."""
  thunks, found, splits, oracles = {"matmul": _matmul(setting)}, {}, {}, {}
  jax.block_until_ready(thunks["matmul"]())
  for candidate in candidates(setting):
    error = check(setting, candidate, oracles)
    stats = jax.block_until_ready(candidate.step(*candidate.arrays))[1]
    jax.block_until_ready(candidate.forward(*candidate.arrays))
    for kind in ("forward", "step"):
      thunks[f"{candidate.name} {kind}"] = functools.partial(
        getattr(candidate, kind), *candidate.arrays
      )
    found[candidate.name] = candidate.moe, stats, error
    few_experts = candidate.moe and candidate.moe.num_experts == min(setting.experts)
    if setting.phases and few_experts and candidate.moe.dispatch in phases.SPLIT:
      for name, thunk in phases.thunks(candidate.graph, candidate.moe, candidate.arrays).items():
        thunks[f"{candidate.name} {name}"] = thunk
        splits.setdefault(candidate.name, []).append(name)
    progress(f"  {candidate.name}: right to {error:.0e}, compiled")
  times = timing.in_turns(thunks, rounds, min_seconds)
  rows = [_row(setting, name, *found[name], times) for name in found]
  return rows, [phases.row(setting.name, name, splits[name], times) for name in splits]


def _row(setting, name, moe, stats, error, times) -> dict[str, Any]:
  balance = {"drop_fraction_Z": [0.0], "max_vio_Z": [0.0]}
  if stats is not None:
    balance = metrics.moe_metrics(jax.tree.map(lambda a: a[None], stats))
  row = {"setting": setting.name, "candidate": name, **setting._asdict()}
  row |= {"dtype": setting.dtype.value, "num_experts": moe.num_experts if moe else 0}
  row |= {"dispatch": moe.dispatch.value if moe else "ffn", "error": error}
  for kind, products in (("forward", 1), ("step", 3)):
    key = f"{name} {kind}"
    row[f"{kind}_s"] = timing.median(times, key)
    row[f"{kind}_vs_ffn"] = timing.ratio(times, key, f"ffn {kind}")
    row[f"{kind}_of_matmul"] = products * timing.ratio(times, "matmul", key)
  row["drop_fraction"] = float(balance["drop_fraction_Z"][0])
  row["max_vio"] = float(balance["max_vio_Z"][0])
  return row


def default_grid(*, short: bool) -> list[Setting]:
  """What suits the platform; `short` leaves out what a CPU takes minutes to compile."""
  if jax.default_backend() != "cpu":
    return ACCELERATOR_GRID
  if not short:
    return CPU_GRID
  return [s._replace(experts=(8, 64), oracles=False) for s in CPU_GRID if s.top_k > 1]


def run(grid: list[Setting], rounds: int, min_seconds: float = 0.05) -> dict[str, Any]:
  """All rows of a grid."""
  rows, splits = [], []
  with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(data=1))):
    for number, setting in enumerate(grid, 1):
      progress(f"layer {number}/{len(grid)}: {setting.name}")
      more = run_setting(setting, rounds, min_seconds)
      rows += more[0]
      splits += more[1]
  return {"rows": rows, "phases": splits}
