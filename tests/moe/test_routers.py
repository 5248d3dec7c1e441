"""Every router on a case worked by hand; who sees the future; what a new router takes."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import (
  Activation,
  Dispatch,
  Exchange,
  GroupScore,
  Loss,
  MoE,
  Priority,
  Router,
  Score,
)
from moe_jax.errors import UserError
from moe_jax.model.transformer import Transformer
from moe_jax.moe import dispatch, routers, validation
from moe_jax.moe.routing import RouterInputs, Routing, Tokens
from moe_jax.training import metrics as metrics_lib
from moe_jax.training import optimizers
from tests.support.toys import (
  ROOT,
  example,
  gradients,
  new_name,
  set_up,
  slow_unless,
  toy_batch,
  toy_config,
)

LOG = np.log


class Routed(NamedTuple):
  assigned: list[tuple[int, int, float]]  # token, expert, gate, in order of priority; no padding
  routing: Routing


def route(probs, *, train=True, capacity=1, real=None, ids=None, noise=None, bias=None, **fields):
  """What a router makes of softmax probabilities [T, E]."""
  logits = LOG(np.array(probs, float))
  T, E = logits.shape
  moe = MoE(num_experts=E, **dict(top_k=1, renormalize=False) | fields)
  inputs = RouterInputs(
    jnp.array(logits, jnp.float32),
    jnp.array([True] * T if real is None else real),
    jnp.array([0] * T if ids is None else ids, jnp.int32),
    jnp.array([0.0] * E if bias is None else bias),
    None if noise is None else jnp.array(noise, jnp.float32),
    {"noise_scale": jnp.ones((T, E))},
  )
  spec = routers.ROUTERS[moe.router]
  function = spec.function if spec.runs_own(train=train) else spec.evaluation
  made = function(inputs, moe, **dict(capacity=capacity) if spec.takes_capacity else {})
  columns = (made.token_N, made.expert_N, made.gate_N, made.real_N)
  assigned = [
    (int(t), int(e), round(float(g), 4)) for t, e, g, r in zip(*columns, strict=True) if r
  ]
  return Routed(assigned, made)


P = [[0.5, 0.1, 0.4], [0.2, 0.7, 0.1]]


BY_HAND = {  # fields: token, expert, gate
  "switch": (dict(router=Router.SWITCH), [(0, 0, 0.5), (1, 1, 0.7)]),
  "topk": (dict(top_k=2), [(0, 0, 0.5), (0, 2, 0.4), (1, 1, 0.7), (1, 0, 0.2)]),
  # Mixtral's softmax over the chosen logits
  "renormalized": (dict(top_k=2, renormalize=True),
                   [(0, 0, 5 / 9), (0, 2, 4 / 9), (1, 1, 7 / 9), (1, 0, 2 / 9)]),
  "scaled": (dict(top_k=2, gate_scale=2.5), [(0, 0, 1.25), (0, 2, 1.0), (1, 1, 1.75), (1, 0, 0.5)]),
  # logits log(p): sigmoid = p / (1 + p)
  "sigmoid": (dict(score=Score.SIGMOID), [(0, 0, 0.5 / 1.5), (1, 1, 0.7 / 1.7)]),
  # follows the noise
  "random": (dict(top_k=2, router=Router.RANDOM, noise=[[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]]),
             [(0, 1, 0.1), (0, 2, 0.4), (1, 0, 0.2), (1, 2, 0.1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_choices_and_gates_by_hand(name):
  fields, want = BY_HAND[name]
  assert route(P, **fields).assigned == [(t, e, round(g, 4)) for t, e, g in want]


@pytest.mark.parametrize("score", list(Score))
def test_a_bias_changes_the_choice_and_no_gate(score):
  """Token 0 is pushed from expert 0 to 2, which is pulled; the gate is expert 2's own score."""
  plain = 0.4 if score is Score.SOFTMAX else round(0.4 / 1.4, 4)
  assert route(P, score=score, bias=[-0.3, 0, 0.1]).assigned[0] == (0, 2, plain)


def test_groups_limit_the_choice():
  """Groups {0,1}, {2,3}: 0.3+0.2 beats 0.4+0.05, so expert 2, the best alone, is not chosen."""
  probs = [[0.3, 0.2, 0.4, 0.05]]
  fields = dict(top_k=2, expert_groups=2, top_groups=1)
  assert route(probs, **fields).assigned == [
    (0, 0, pytest.approx(0.3158)),
    (0, 1, pytest.approx(0.2105)),
  ]


def test_noisy_topk():
  """Noise turns token 0 from expert 0 to 2; the chances are normal ones of the clean logits."""
  noise = [[-3.0, 0, 0.5], [0, 0, 0]]
  got, routing = route(P, router=Router.NOISY_TOPK, noise=noise)
  assert [(t, e) for t, e, _ in got] == [(0, 2), (1, 1)]
  noisy = LOG(P[0]) + noise[0]
  softmax = np.exp(noisy) / np.exp(noisy).sum()
  assert got[0][2] == pytest.approx(softmax[2], abs=1e-4)
  # Expert 2 was chosen: it competes with the runner-up, expert 1; the others with expert 2.
  thresholds = [noisy[2], noisy[2], noisy[1]]
  cdf = [float(jax.scipy.stats.norm.cdf(LOG(P[0][e]) - thresholds[e])) for e in range(3)]
  np.testing.assert_allclose(routing.load_TE[0], cdf, rtol=1e-4)
  assert [e for _, e, _ in route(P, router=Router.NOISY_TOPK, train=False).assigned] == [0, 1]


def test_expert_choice():
  """C=1: each expert takes its best token; token 0 is taken twice, padding never."""
  probs = [[0.5, 0.1, 0.4], [0.2, 0.7, 0.1], [0.8, 0.1, 0.1]]
  fields = dict(router=Router.EXPERT_CHOICE, real=[True, True, False])
  assert route(probs, **fields).assigned == [(0, 0, 0.5), (1, 1, 0.7), (0, 2, 0.4)]
  two = route(probs, capacity=3, **fields).assigned  # only two real tokens to take
  assert sorted(two) == sorted((t, e, probs[t][e]) for t in range(2) for e in range(3))


SINKHORN = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]  # all tokens prefer expert 0
BALANCED = [(0, 0, 0.9), (1, 0, 0.8), (2, 1, 0.3), (3, 1, 0.4)]


def test_sinkhorn_gives_an_expert_the_tokens_that_want_it_most():
  """In training only; and padding does not count, which wants expert 0 too."""
  assert route(SINKHORN, router=Router.SINKHORN).assigned == BALANCED
  assigned = route(SINKHORN, router=Router.SINKHORN, train=False).assigned
  assert [e for _, e, _ in assigned] == [0, 0, 0, 0]
  real = [True] * 4 + [False]
  padded = route([*SINKHORN, [0.99, 0.01]], router=Router.SINKHORN, real=real)
  assert padded.assigned == BALANCED


def test_hash_by_token_id():
  """Same id, same expert, whatever the logits; the gate is that expert's probability."""
  got = route([P[0], P[1], P[0]], router=Router.HASH, ids=[7, 8, 7]).assigned
  assert got[0][1:] == got[2][1:] and got[0][2] == P[0][got[0][1]]
  every = route([[0.25] * 4] * 4000, router=Router.HASH, ids=range(4000)).assigned
  assert np.bincount([e for _, e, _ in every]).min() > 900  # a fair draw: 1000 +- 27


def test_priorities_order_the_assignments():
  """Two choices each; token 1 is surer (0.7) than token 0 (0.5)."""
  order = {
    priority: [(t, e) for t, e, _ in route(P, top_k=2, priority=priority).assigned]
    for priority in Priority
  }
  assert order[Priority.TOKEN] == [(0, 0), (0, 2), (1, 1), (1, 0)]
  assert order[Priority.CHOICE] == [(0, 0), (1, 1), (0, 2), (1, 0)]
  assert order[Priority.SCORE] == [(1, 1), (0, 0), (1, 0), (0, 2)]


def test_priorities_drop_by_hand():
  """Both tokens choose expert 0 first and 1 second, one slot each."""
  probs = [[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]]
  kept = {}
  for priority in Priority:
    made = route(probs, top_k=2, priority=priority).routing
    slots = dispatch.capacity_slots(made, 3, 1, capacity=1)
    columns = (made.token_N, made.expert_N, slots.kept_N)
    kept[priority] = {(int(t), int(e)) for t, e, k in zip(*columns, strict=True) if k}
  assert kept[Priority.TOKEN] == kept[Priority.CHOICE] == {(0, 0), (0, 1)}
  assert kept[Priority.SCORE] == {(1, 0), (1, 1)}


# Which routings promise that a token's output does not depend on later ones: (training, evaluation)
CAUSAL = {
  "topk": (dict(), True, True),
  "switch": (dict(router=Router.SWITCH, top_k=1, renormalize=False), True, True),
  "deepseek": (
    dict(score=Score.SIGMOID, expert_groups=2, top_groups=1, bias_update_rate=1e-3), True, True,
  ),
  "noisy": (dict(router=Router.NOISY_TOPK), True, True),
  "hash": (dict(router=Router.HASH, top_k=1, renormalize=False), True, True),
  "random": (dict(router=Router.RANDOM, renormalize=False), True, True),
  "choice": (dict(priority=Priority.CHOICE), False, False),
  "score": (dict(priority=Priority.SCORE), False, False),
  "score, dropless evaluation": (
    dict(priority=Priority.SCORE, eval_capacity_factor=math.inf), False, True,
  ),
  "sinkhorn": (dict(router=Router.SINKHORN), False, True),
  "expert choice": (dict(router=Router.EXPERT_CHOICE, renormalize=False), False, False),
}  # fmt: skip


# Of each kind of promise one.
EVERYDAY = ["deepseek", "choice", "score, dropless evaluation", "sinkhorn", "expert choice"]


@pytest.mark.preflight
@pytest.mark.parametrize("name", slow_unless(EVERYDAY, CAUSAL))
def test_causality_is_as_documented(name, one_device):
  """The last token changed: earlier logits bit-equal where that is promised, and not elsewhere."""
  fields, in_training, in_evaluation = CAUSAL[name]
  fields = dict(capacity_factor=0.7, eval_capacity_factor=0.7) | fields
  config = toy_config({"loss": Loss(load_balance=0.0)}, **fields)
  validation.validate(config)
  graph, params = nnx.split(Transformer(config.model, nnx.Rngs(0)))

  def scale(path, leaf):
    return leaf * 60 if sharding.param_name(path) == "router_DE" else leaf

  params = jax.tree_util.tree_map_with_path(scale, params)
  B, L = 64, config.data.seq_len
  rng = np.random.default_rng(0)
  tokens_BL = rng.integers(0, 24, (B, L)).astype(np.int32)
  changed_BL = tokens_BL.copy()
  changed_BL[:, -1] = (changed_BL[:, -1] + rng.integers(1, 24, B)) % 24
  ones, positions = np.ones((B, L), np.int32), np.tile(np.arange(L, dtype=np.int32), (B, 1))
  bias_ZE = jnp.array(rng.normal(size=(2, 4)) * 0.01, jnp.float32)
  for train_mode, promised in ((True, in_training), (False, in_evaluation)):
    assert promised == (not validation.future_leak(config.model.moe, train=train_mode))

    @jax.jit
    def logits(tokens_BL, train_mode=train_mode):
      model = nnx.merge(graph, params)
      tokens = Tokens(tokens_BL, ones, positions)
      return model(tokens, bias_ZE, jax.random.key(3), train=train_mode).logits_BLV

    before, after = (np.asarray(logits(t))[:, :-1] for t in (tokens_BL, changed_BL))
    assert np.array_equal(before, after) == promised


@pytest.mark.parametrize(
  ("router", "why"),
  [(Router.EXPERT_CHOICE, "compares all tokens.*causal router"), (Router.RANDOM, "place in")],
)
def test_generation_refuses_what_it_cannot_follow(router, why):
  moe = toy_config(router=router, renormalize=False).model.moe
  with pytest.raises(UserError, match=rf"router={router.value}.*{why}"):
    validation.validate_generation(moe)
  for fits in (dict(router=Router.SINKHORN), dict(priority=Priority.SCORE), dict(num_experts=0)):
    validation.validate_generation(toy_config(**fits).model.moe)


@pytest.fixture
def gumbel(monkeypatch):
  """The router of docs/extending.md, as it stands there, under a new name."""
  code = example("RouterSpec")
  assert len(code.splitlines()) <= 32
  new = new_name(monkeypatch, Router, "gumbel")
  monkeypatch.setitem(routers.ROUTERS, new, None)  # so that it is taken out again
  exec(compile(code, "docs/extending.md", "exec"), {})
  return new


@pytest.mark.slow
@pytest.mark.preflight
def test_a_new_router_is_one_record(gumbel):
  """With noise and a parameter: a mesh trains it as one device does, and all know the parameter."""
  results = []
  for axes, how in (({}, "gather"), (dict(expert=2, data=2), "einsum")):
    config = toy_config({"loss": Loss(load_balance=0.01)}, router=gumbel, dispatch=Dispatch(how))
    mesh, state, step = set_up(config, axes)
    batch = toy_batch(config)
    with jax.set_mesh(mesh):
      batch = sharding.to_global(batch, mesh)
      grads = jax.jit(lambda s, b, c=config: gradients(s, b, c))(state, batch)
      new, metrics = step(state, batch)
    results.append(jax.device_get((grads, metrics)))
  for tree in (new.params, new.opt_state):  # of the mesh; Adam's moments too
    named = {sharding.param_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    assert named["sharpness_DE"].sharding.is_fully_replicated
    assert not named["gate_EDF"].sharding.is_fully_replicated
  leaves = jax.tree_util.tree_leaves_with_path(results[0][0])
  norms = {sharding.param_name(path): np.sqrt((np.asarray(g) ** 2).sum()) for path, g in leaves}
  assert norms["sharpness_DE"] > 1e-3
  router = np.hypot(norms["sharpness_DE"], norms["router_DE"])
  grouped = metrics_lib.gradient_norms(results[0][0])
  np.testing.assert_allclose(grouped["grad_norm_router"], router, rtol=1e-5)
  assert not optimizers.decays("sharpness_DE") and optimizers.decays("gate_EDF")
  # float32 rounding of gradients of order 0.01 to 1
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, results[1], results[0])


def test_the_page_lists_the_records():
  page = (ROOT / "docs/routing.md").read_text()
  assert set(routers.ROUTERS) == set(Router)
  for router, spec in routers.ROUTERS.items():
    papers = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in spec.papers)
    causal = "yes"
    if spec.looks_ahead:
      causal = "**not in training**" if spec.evaluation else "**no**"
    assert f"| `{router.value}` | {papers} | {causal} | {spec.doc} |\n" in page


def test_the_page_names_every_word_of_an_option():
  page = (ROOT / "docs/routing.md").read_text()
  for word in (*Activation, *GroupScore, *Priority, *Score, *Dispatch, *Exchange):
    assert f"`{word.value}`" in page or f"={word.value}`" in page, word


def test_only_its_record_names_a_router():
  for path in (ROOT / "moe_jax").rglob("*.py"):
    if path.name != "routers.py" and path.parent.name != "config":
      assert not re.search(r"Router\.[A-Z]", path.read_text()), path
