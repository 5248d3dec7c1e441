"""Times the MoE layer with each dispatcher and a dense FFN of equal active FLOPs, on one device.

A grid is a list of `Setting`s; the candidates of one setting are timed in turns. A program is
compared with the dense dispatcher, the oracle, before it is timed. Weights are already in the
compute dtype, so the times leave out the cast, which a training step does once. Times are
wall-clock seconds of the forward pass, and of forward and backward pass together (`step`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import phases, timing
from benchmarks.results import progress
from moe_jax import sharding
from moe_jax.config import Dispatch, Dtype, GroupedMatmul, Mesh, Model, MoE
from moe_jax.errors import UserError
from moe_jax.kernels import experts as expert_kernels
from moe_jax.kernels.expert_weights import MATRICES, Experts
from moe_jax.model.feedforward import DenseFFN, MoEFFN, feedforward, moe_feedforward
from moe_jax.moe.routing import Mode, Tokens
from moe_jax.training import metrics


class Setting(NamedTuple):
  """One D, F, K and number of tokens, and the numbers of experts to compare."""

  dim: int
  expert_dim: int
  top_k: int
  experts: tuple[int, ...]
  rows: int  # B; each row is a routing group
  seq_len: int  # L
  dtype: Dtype = Dtype.FLOAT32
  oracles: bool = False  # also time einsum and dense, with the fewest experts
  phases: bool = False  # also time the pieces of the layer, with the fewest experts

  @property
  def name(self) -> str:
    """The setting in one line."""
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
  """The arguments of a candidate."""

  params: Any
  x_BLD: jax.Array
  real_BL: jax.Array | None
  dy_BLD: jax.Array


class Candidate(NamedTuple):
  """A layer and its compiled programs."""

  name: str
  kind: str  # "ffn", a dispatcher, or "slots" and "blocks": the experts alone
  experts: int
  moe: MoE | None  # None: nothing is routed
  graph: Any
  forward: Callable[..., Any]  # (*Arrays) -> (y_BLD, MoeStats or None)
  step: Callable[..., Any]  # (*Arrays) -> (y_BLD, MoeStats or None, (dparams, dx_BLD))
  arrays: Arrays


def make_moe(setting: Setting, dispatch: Dispatch, experts: int) -> MoE:
  """Returns the configuration of an MoE layer of a setting."""
  return MoE(
    num_experts=experts,
    top_k=setting.top_k,
    expert_dim=setting.expert_dim,
    dispatch=dispatch,
    capacity_factor=1.0,
  )


def _programs(graph: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
  def forward(params, x_BLD, real_BL, dy_BLD):
    layer = nnx.merge(graph, params)
    if isinstance(layer, DenseFFN):
      return feedforward(x_BLD, layer.weights(x_BLD.dtype)), None
    ids_BL, key = jnp.zeros(real_BL.shape, jnp.int32), jax.random.key(0)
    weights = layer.ffn_weights(x_BLD.dtype, jnp.zeros(layer.moe.num_experts))
    tokens, model = Tokens(ids_BL, real_BL.astype(jnp.int32), ids_BL), Model(moe=layer.moe)
    out = moe_feedforward(x_BLD, tokens, weights, model, key, Mode(train=True))
    return out.y_BLD, out.stats

  def step(params, x_BLD, real_BL, dy_BLD):
    run = functools.partial(forward, real_BL=real_BL, dy_BLD=None)
    y_BLD, vjp, stats = jax.vjp(run, params, x_BLD, has_aux=True)
    return y_BLD, stats, vjp(dy_BLD)

  return jax.jit(forward), jax.jit(step)


def _init(model: Model, experts: int, ffn_dim: int) -> tuple[Any, Any]:
  """Returns the graph and the weights of an MoE layer, or of a dense FFN for experts=0."""

  def make(key):
    rngs = nnx.Rngs(key)
    layer = MoEFFN(model, rngs) if experts else DenseFFN(model, ffn_dim, rngs)
    if experts:  # logits of standard deviation 1, like those of a router after some training
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
  """Returns x_BLD, real_BL, dy_BLD; tokens share a direction, as hidden states do.

  The shared direction makes loads uneven.
  """

  def make(key):
    shape = (setting.rows, setting.seq_len, setting.dim)
    own, shared, dy = jax.random.split(key, 3)
    x_BLD = 0.98 * jax.random.normal(own, shape) + 0.2 * jax.random.normal(shared, (1, 1, shape[2]))
    arrays = x_BLD, jax.random.normal(dy, shape)
    return tuple(a.astype(setting.dtype.value) for a in arrays)

  x_BLD, dy_BLD = jax.jit(make)(jax.random.key(1))
  return x_BLD, jnp.ones(x_BLD.shape[:2], bool), dy_BLD


def candidates(setting: Setting) -> Iterator[Candidate]:
  """Yields the dense FFN, then every dispatcher with every number of experts."""
  x_BLD, real_BL, dy_BLD = _inputs(setting)
  model = Model(dim=setting.dim, compute_dtype=setting.dtype)
  graph, params = _init(model, 0, setting.top_k * setting.expert_dim)
  dense = Arrays(params, x_BLD, real_BL, dy_BLD)
  yield Candidate("ffn", "ffn", 0, None, graph, *_programs(graph), dense)
  for experts in setting.experts:
    dispatchers = [Dispatch.GATHER, Dispatch.GROUPED]
    if setting.oracles and experts == min(setting.experts):
      dispatchers += [Dispatch.EINSUM, Dispatch.DENSE]
    params = None
    for dispatch in dispatchers:
      moe = make_moe(setting, dispatch, experts)
      graph, fresh = _init(dataclasses.replace(model, moe=moe), experts, 0)
      params = params or fresh  # one copy, because the weights do not depend on the dispatcher
      arrays = Arrays(params, x_BLD, real_BL, dy_BLD)
      name = f"{dispatch.value} E={experts}"
      yield Candidate(name, dispatch.value, experts, moe, graph, *_programs(graph), arrays)
    yield from _experts_alone(setting, experts, params, x_BLD, dy_BLD)


def _experts_alone(
  setting: Setting, experts: int, params: Any, x_BLD: jax.Array, dy_BLD: jax.Array
) -> Iterator[Candidate]:
  """Yields what bounds the dispatchers: the same matrices and rows, equally many for each expert.

  Nothing is routed, so that what a layer takes longer is the routing. Slots are the layout of
  `gather`, and blocks that of `grouped`.
  """
  matrices = {name: params[name][...] for name in MATRICES}
  x_ND, dy_ND = (jnp.tile(a.reshape(-1, setting.dim), (setting.top_k, 1)) for a in (x_BLD, dy_BLD))
  rows = len(x_ND) // experts
  for kind in ("slots", "blocks"):

    def forward(matrices, x, real_BL, dy, kind=kind):
      sizes_E = jnp.full((experts,), rows) if kind == "blocks" else None
      kernel = GroupedMatmul.AUTO
      return expert_kernels.experts(x, sizes_E, Experts(**matrices), kernel), None

    def step(matrices, x, real_BL, dy, forward=forward):
      y, vjp = jax.vjp(lambda m, x: forward(m, x, None, None)[0], matrices, x)
      return y, None, vjp(dy)

    arrays = Arrays(matrices, x_ND, None, dy_ND)
    if kind == "slots":
      shape = (experts, rows, setting.dim)
      arrays = Arrays(matrices, x_ND.reshape(shape), None, dy_ND.reshape(shape))
    name = f"{kind} E={experts}, not routed"
    yield Candidate(name, kind, experts, None, None, jax.jit(forward), jax.jit(step), arrays)


def check(
  setting: Setting, candidate: Candidate, oracles: dict[int, Any], tokens: int = 64
) -> float:
  """Returns the error of a candidate against the dense oracle, relative to the oracle's scale.

  Only some evenly spaced tokens are compared, and only they have a gradient. A grouped candidate
  runs the program that is timed, on all tokens. A candidate with a capacity would drop tokens, so
  its dispatcher is compiled again for the compared tokens, with a slot for each.

  Args:
    setting: of the candidate.
    candidate: the layer to check; the dense FFN has no error by definition.
    oracles: results of the oracle by number of experts; new ones are added, and candidates share
      them.
    tokens: about how many tokens to compare.

  Raises:
    UserError: the error is too large.
  """
  if candidate.moe is None:
    return 0.0
  arrays, E = candidate.arrays, candidate.moe.num_experts
  every = max(1, setting.rows * setting.seq_len // tokens)
  some = functools.partial(_some, every=every)
  few = Arrays(
    params=arrays.params,
    x_BLD=some(arrays.x_BLD),
    real_BL=some(arrays.real_BL),
    dy_BLD=some(arrays.dy_BLD),
  )

  def small(dispatch):
    moe = dataclasses.replace(candidate.moe, dispatch=dispatch, capacity_factor=math.inf)
    model = Model(dim=setting.dim, compute_dtype=setting.dtype, moe=moe)
    layer = nnx.eval_shape(lambda: MoEFFN(model, nnx.Rngs(0)))
    return _programs(nnx.split(layer)[0])[1](*few)

  if E not in oracles:
    oracles[E] = small(Dispatch.DENSE)
  if candidate.moe.dispatch is Dispatch.GROUPED:
    masked = arrays._replace(dy_BLD=_only_some(arrays.dy_BLD, every))
    y, _, (dparams, dx) = candidate.step(*masked)
    results = some(y), (dparams, some(dx))
  else:
    y, _, gradients = small(candidate.moe.dispatch)
    results = y, gradients
  # Sums in another order differ by 1e-6 in float32 here; bfloat16 rounds each sum to 4e-3.
  limit = 1e-4 if setting.dtype is Dtype.FLOAT32 else 5e-2
  y, _, gradients = oracles[E]
  errors = jax.tree.map(_error, results, (y, gradients))
  worst = max(map(float, jax.tree.leaves(errors)))
  if not worst <= limit:  # true for NaN too
    raise UserError(
      f"{setting.name} {candidate.name}: output or gradients differ from the dense oracle by "
      f"{worst:.1e} of their scale, more than {limit:.0e}; wrong programs are not timed"
    )
  return worst


@functools.partial(jax.jit, static_argnames="every")
def _some(x_BLD, every):
  """Returns one token of `every` tokens, all in one row."""
  return x_BLD.reshape(1, -1, *x_BLD.shape[2:])[:, ::every]


@functools.partial(jax.jit, static_argnames="every")
def _only_some(x_BLD, every):
  """Sets all tokens to 0 that `_some` leaves out."""
  x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
  return jnp.where(jnp.arange(len(x_TD))[:, None] % every == 0, x_TD, 0).reshape(x_BLD.shape)


@jax.jit
def _error(x, want):
  x, want = x.astype(jnp.float32), want.astype(jnp.float32)
  # The root mean square, because single elements of a bfloat16 sum can be off by more.
  return jnp.sqrt(jnp.mean((x - want) ** 2) / jnp.maximum(jnp.mean(want**2), 1e-30))


def _matmul(setting: Setting) -> Callable[[], jax.Array]:
  """Returns a function that computes one dense matmul of the FLOPs of the layer's forward pass."""
  T, D, F = setting.rows * setting.seq_len, setting.dim, 3 * setting.top_k * setting.expert_dim
  dtype = setting.dtype.value
  x_TD, w_DF = (jax.random.normal(jax.random.key(2), s, dtype) for s in ((T, D), (D, F)))
  return functools.partial(jax.jit(jnp.dot), x_TD, w_DF)


def run_setting(
  setting: Setting, rounds: int, min_seconds: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Times one setting.

  Returns:
    A row for each candidate, and a row for each candidate whose time is split into phases.
  """
  thunks, results, splits, oracles = {"matmul": _matmul(setting)}, {}, {}, {}
  jax.block_until_ready(thunks["matmul"]())
  for candidate in candidates(setting):
    error = check(setting, candidate, oracles)
    _, stats, _ = jax.block_until_ready(candidate.step(*candidate.arrays))
    jax.block_until_ready(candidate.forward(*candidate.arrays))
    for kind in ("forward", "step"):
      thunks[f"{candidate.name} {kind}"] = functools.partial(
        getattr(candidate, kind), *candidate.arrays
      )
    results[candidate.name] = candidate, stats, error
    few_experts = candidate.moe and candidate.moe.num_experts == min(setting.experts)
    if setting.phases and few_experts and candidate.moe.dispatch in phases.SPLIT:
      for name, thunk in phases.thunks(candidate.graph, candidate.moe, candidate.arrays).items():
        thunks[f"{candidate.name} {name}"] = thunk
        splits.setdefault(candidate.name, []).append(name)
    progress(f"  {candidate.name}: compiled; differs from the oracle by {error:.0e}")
  times = timing.in_turns(thunks, rounds, min_seconds)
  rows = [_row(setting, name, *result, times) for name, result in results.items()]
  return rows, [phases.row(setting.name, name, splits[name], times) for name in splits]


def _row(setting, name, candidate, stats, error, times) -> dict[str, Any]:
  balance = {"drop_fraction_Z": [0.0], "max_vio_Z": [0.0]}
  if stats is not None:
    balance = metrics.moe_metrics(jax.tree.map(lambda a: a[None], stats))
  row = {"setting": setting.name, "candidate": name, **setting._asdict()}
  row |= {"dtype": setting.dtype.value, "num_experts": candidate.experts}
  row |= {"dispatch": candidate.kind, "error": error}
  for kind, products in (("forward", 1), ("step", 3)):
    key = f"{name} {kind}"
    row[f"{kind}_s"] = timing.median(times, key)
    row[f"{kind}_vs_ffn"] = timing.ratio(times, key, f"ffn {kind}")
    row[f"{kind}_of_matmul"] = products * timing.ratio(times, "matmul", key)
  row["drop_fraction"] = float(balance["drop_fraction_Z"][0])
  row["max_vio"] = float(balance["max_vio_Z"][0])
  return row


def default_grid(*, short: bool) -> list[Setting]:
  """Returns the grid for this platform; `short` leaves out settings that compile for minutes."""
  if jax.default_backend() != "cpu":
    return ACCELERATOR_GRID
  if not short:
    return CPU_GRID
  return [s._replace(experts=(8, 64), oracles=False) for s in CPU_GRID if s.top_k > 1]


def run(grid: list[Setting], rounds: int, min_seconds: float = 0.05) -> dict[str, Any]:
  """Times a grid; returns its rows and the rows of phases."""
  rows, splits = [], []
  with jax.set_mesh(sharding.make_mesh(Mesh(data=1))):
    for number, setting in enumerate(grid, 1):
      progress(f"layer {number}/{len(grid)}: {setting.name}")
      setting_rows, setting_splits = run_setting(setting, rounds, min_seconds)
      rows += setting_rows
      splits += setting_splits
  return {"rows": rows, "phases": splits}
