"""Every optimizer: by NumPy or by hand, on meshes, what it decays, what its state takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import sharding
from moe_jax.config import Dtype, Optimizer, OptimizerName, Schedule, override
from moe_jax.model import cost
from moe_jax.moe.balance import updated_bias
from moe_jax.training import optimizers
from moe_jax.training import setup as setup_lib
from moe_jax.training.step import compile_step
from tests.support.toys import (
  ROOT,
  example,
  mesh_of,
  new_name,
  slow_unless,
  toy_batch,
  toy_config,
)

MESHES = [{}, dict(expert=2, fsdp=2)]
STACKED = {  # name: shape, with the layers Z before the letters
  "up_EDF": (2, 4, 6, 10),
  "down_EFD": (2, 4, 10, 6),
  "q_DHA": (2, 6, 4, 3),
  "out_HAD": (2, 4, 3, 6),
}


def settings(name, **more):
  return Optimizer(name=name, warmup_steps=1, clip_norm=0.0, **more)


def draw(shapes, seed):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def updates_of(optimizer, params, steps_of_grads, axes):
  """The updates of each step, computed under jit with the state sharded over the mesh."""
  transform, mesh = optimizers.make_optimizer(optimizer, 10), mesh_of(**axes)
  placed = jax.device_put(params, sharding.param_shardings(params, mesh))
  shapes = jax.eval_shape(transform.init, placed)
  shardings = sharding.param_shardings(shapes, mesh, params)
  state, found = jax.jit(transform.init, out_shardings=shardings)(placed), []
  update = jax.jit(transform.update, out_shardings=(None, shardings))
  for grads in steps_of_grads:
    grads = jax.device_put(grads, sharding.param_shardings(grads, mesh))
    updates, state = update(grads, state, placed)
    found.append(jax.device_get(updates))
  return found


def orthogonal(matrix):
  """Five steps of Newton-Schulz, as in https://github.com/KellerJordan/Muon."""
  x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
  x = x / np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x.T if matrix.shape[0] > matrix.shape[1] else x


def matrices(name, stack):
  """Each layer's, and each expert's, [inputs, outputs]: written without the shape letters."""
  if name == "q_DHA":
    return stack.reshape(2, 6, 12)
  if name == "out_HAD":
    return stack.reshape(2, 12, 6)
  return stack.reshape(8, *stack.shape[2:])


@pytest.mark.parametrize("axes", slow_unless(MESHES[1:], MESHES))
def test_muon_updates_each_expert_as_if_it_were_alone(axes):
  optimizer = settings(OptimizerName.MUON, weight_decay=0.0, schedule=Schedule.CONSTANT)
  steps = [draw(STACKED, 1), draw(STACKED, 2)]
  first, second = updates_of(optimizer, draw(STACKED, 0), steps, axes)
  beta, rate = 0.95, optimizer.learning_rate
  for name in STACKED:
    for number, got in enumerate(matrices(name, second[name])):
      one, two = (matrices(name, grads[name])[number].astype(float) for grads in steps)
      momentum = beta * (1 - beta) * one + (1 - beta) * two
      ahead = beta * momentum / (1 - beta**3) + (1 - beta) * two / (1 - beta**2)
      scale = 0.2 * max(one.shape) ** 0.5
      # Five steps in float32, each of which grows a small singular value threefold.
      np.testing.assert_allclose(got, -rate * scale * orthogonal(ahead), rtol=1e-3, atol=1e-6)
    assert np.abs(first[name] - second[name]).max() > 1e-5


def test_muon_gathers_no_experts():
  """Each device orthogonalises its own: 2 layers of 8 experts over 4 devices."""
  params, mesh = {"up_EDF": jax.ShapeDtypeStruct((2, 8, 16, 32), np.float32)}, mesh_of(expert=4)
  transform = optimizers.make_optimizer(settings(OptimizerName.MUON), 10)
  shapes = jax.eval_shape(transform.init, params)
  places = [sharding.param_shardings(tree, mesh, params) for tree in (params, shapes)]
  updated = jax.jit(
    transform.update, in_shardings=(*places, places[0]), out_shardings=tuple(places)
  )
  text = updated.lower(params, shapes, params).compile().as_text()
  assert "all-gather" not in text and "all-to-all" not in text
  assert "f32[4,16,16]" in text and "f32[16,16,16]" not in text


def test_muon_reads_its_matrices_from_the_letters():
  axes = optimizers.muon_axes
  assert axes("q_DHA", 4) == ((-3,), (-2, -1)) and axes("out_HAD", 4) == ((-3, -2), (-1,))
  assert axes("up_EDF", 4) == ((-2,), (-1,)) and axes("down_EFD", 3) == ((-2,), (-1,))
  assert axes("up_DF", 2) == ((-2,), (-1,)) and axes("down_FD", 3) == ((-2,), (-1,))
  assert axes("q_down_DQ", 3) == axes("kv_down_DU", 3) == ((-2,), (-1,))
  assert axes("kv_up_WHY", 4) == ((-3,), (-2, -1)) and axes("out_HXD", 4) == ((-3, -2), (-1,))
  for name in ("embed_VD", "head_DV", "router_DE", "noise_DE", "norm_D", "norm_A", "sinks_H"):
    assert axes(name, 3) is None


WIDE = {"up_EDF": (2, 4, 128, 256), "down_EFD": (2, 4, 256, 128), "q_DHA": (2, 6, 4, 3)}


def test_adafactors_rows_and_columns_lie_where_their_weights_do():
  params = draw(WIDE, 0)
  transform = optimizers.make_optimizer(settings(OptimizerName.ADAFACTOR), 10)
  state = jax.eval_shape(transform.init, params)
  found = sharding.param_shardings(state, mesh_of(expert=2, fsdp=2), params)[0]
  shapes = {name: leaf.shape for name, leaf in state[0].v_row.items()}
  assert shapes == {"up_EDF": (2, 4, 128), "down_EFD": (2, 4, 128), "q_DHA": (1,)}
  row = {name: placed.spec for name, placed in found.v_row.items()}
  column = {name: placed.spec for name, placed in found.v_col.items()}
  assert row["up_EDF"] == row["down_EFD"] == P(None, "expert", "fsdp")
  assert column["up_EDF"] == column["down_EFD"] == P(None, "expert", "tensor")
  assert row["q_DHA"] == found.v["up_EDF"].spec == found.count.spec == P()
  assert found.v["q_DHA"].spec == P(None, "fsdp", "tensor", None)


@pytest.mark.parametrize("axes", slow_unless(MESHES[1:], MESHES))
def test_adafactor_by_numpy(axes):
  grads, params = draw(WIDE, 1), draw(WIDE, 0)
  optimizer = settings(OptimizerName.ADAFACTOR)
  (got,) = updates_of(optimizer, params, [grads], axes)
  square = grads["up_EDF"].astype(float) ** 2
  row, column = square.mean(axis=3, keepdims=True), square.mean(axis=2, keepdims=True)
  want = grads["up_EDF"] / np.sqrt(row * column / row.mean(axis=2, keepdims=True))
  want /= max(1, np.sqrt(np.mean(want**2)))
  want = -optimizer.learning_rate * (want + optimizer.weight_decay * params["up_EDF"])
  np.testing.assert_allclose(got["up_EDF"], want, rtol=1e-4, atol=1e-8)


# 130 experts of a width between: a row of 130 of them would be the second largest dimension.
MANY = {
  "up_EDF": (2, 130, 6, 256),
  "down_EFD": (2, 130, 140, 128),
  "router_DE": (2, 150, 130),
  "gate_bias_EF": (2, 130, 140),
}


def test_adafactor_updates_each_of_many_experts_as_if_it_were_alone():
  """By its own row and column, or its own entries; a router is one matrix."""
  optimizer = settings(OptimizerName.ADAFACTOR, weight_decay=0.0, schedule=Schedule.CONSTANT)
  # Smaller ones after the first, so that nothing is clipped: a clip is over all of a parameter.
  steps = [draw(MANY, 1), {name: 0.1 * grad for name, grad in draw(MANY, 2).items()}]
  params = draw(MANY, 0)
  together = updates_of(optimizer, params, steps, {})[1]

  def one(tree, layer, expert):
    layer, expert = slice(layer, layer + 1), slice(expert, expert + 1)
    return {n: x[layer] if n == "router_DE" else x[layer, expert] for n, x in tree.items()}

  for layer, expert in ((0, 0), (1, 129)):
    alone = updates_of(
      optimizer, one(params, layer, expert), [one(grads, layer, expert) for grads in steps], {}
    )[1]
    for name, want in alone.items():
      got = one(together, layer, expert)[name]
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=0, err_msg=name)
      assert np.sqrt(np.mean(want**2)) < 0.9 * optimizer.learning_rate
  state = jax.eval_shape(optimizers.make_optimizer(optimizer, 10).init, params)[0]
  shapes = {name: (state.v_row[name].shape, state.v[name].shape) for name in MANY}
  assert shapes["down_EFD"] == ((2, 130, 128), (2, 130, 1))
  assert shapes["up_EDF"] == ((2, 130, 1), MANY["up_EDF"])
  assert shapes["router_DE"] == ((2, 130), (1,)) and state.count.shape == ()


# name: shape, with the layers where there are some
DECAYING = STACKED | {"kv_up_WHY": (2, 6, 4, 3), "down_FD": (2, 10, 6), "head_DV": (6, 8)}
STEADY = {"embed_VD": (8, 6), "router_DE": (2, 6, 4), "norm_D": (2, 6), "sinks_H": (2, 4),
          "router_bias_E": (2, 4), "gate_bias_EF": (2, 4, 10)}  # fmt: skip


@pytest.mark.parametrize("name", OptimizerName)
def test_schedule_and_weight_decay_mean_the_same(name):
  """Without a gradient a weight moves by rate * decay, or not at all."""
  shapes = DECAYING | STEADY
  params, zeros = draw(shapes, 0), {name: np.zeros(s, np.float32) for name, s in shapes.items()}
  optimizer = settings(name)
  found = updates_of(optimizer, params, [zeros] * 5, {})
  for step, updates in enumerate(found):
    rate = float(optimizers.schedule(optimizer, 10)(step))
    for which, update in updates.items():
      want = -rate * optimizer.weight_decay * params[which] * (which in DECAYING)
      np.testing.assert_allclose(update, want, rtol=1e-5, atol=1e-9, err_msg=which)


def train_losses(name, axes, fields=()):
  mesh = mesh_of(**axes)
  config = override(toy_config(), {"optimizer.name": name, **dict(fields)})
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    step, state = compile_step(setup, only=("loss",)), setup.init()
    batch = sharding.to_global(toy_batch(config), mesh)
    losses = []
    for _ in range(8):
      state, values = step(state, batch)
      losses.append(float(values["loss"]))
  return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", OptimizerName)
def test_training_lowers_the_loss_and_is_the_same_on_a_mesh(name):
  one = train_losses(name, {})
  assert one[-1] < one[0] - 0.05
  # Rounding in Newton-Schulz, and from there on in every step.
  assert train_losses(name, MESHES[1]) == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("name", slow_unless(["adamw"], ["adamw", "muon"]))
def test_first_moments_can_be_bfloat16(name):
  """The losses are those of float32 moments but for rounding."""
  name = OptimizerName(name)
  short = train_losses(name, {}, {"optimizer.moment_dtype": Dtype.BFLOAT16})
  assert short != train_losses(name, {}) == pytest.approx(short, rel=1e-2)


def test_state_is_counted_from_its_shapes():
  config = toy_config()
  sizes = {path[-1]: 0 for path in cost.parameters(config.model)}
  for path, leaf in cost.parameters(config.model).items():
    sizes[path[-1]] += leaf.size
  matrices = sum(size for name, size in sizes.items() if optimizers.muon_axes(name, 9))
  total = sum(sizes.values())
  counted = {}
  for name in OptimizerName:
    config = override(config, {"optimizer.name": name})
    counted[name] = cost.state_bytes(config, optimizers.abstract_state(config))
  # Weights, gradients and moments of 4 bytes; a few counts beside them.
  assert 0 < counted[OptimizerName.ADAMW] - 16 * total <= 16
  assert 0 < counted[OptimizerName.MUON] - 16 * total + 4 * matrices <= 64
  config = override(config, {"optimizer.name": OptimizerName.ADAMW})
  short = override(config, {"optimizer.moment_dtype": Dtype.BFLOAT16})
  first = cost.state_bytes(short, optimizers.abstract_state(short))
  assert counted[OptimizerName.ADAMW] - first == 2 * total
  config = override(config, {"mesh.expert": 2})
  whole = {name for name in sizes if "norm" in name or name == "router_DE"}  # on every device
  split = sum(size for name, size in sizes.items() if name not in whole)
  halved = cost.state_bytes(config, optimizers.abstract_state(config))
  assert counted[OptimizerName.ADAMW] - halved == 16 * split // 2


def test_the_guide_shows_every_optimizer():
  guide = " ".join((ROOT / "docs/guide.md").read_text().split())
  assert set(optimizers.OPTIMIZERS) == set(OptimizerName)
  for name, record in optimizers.OPTIMIZERS.items():
    assert f"| `{name.value}` | {record.about} |" in guide


@pytest.mark.slow
def test_a_new_optimizer_is_one_record(monkeypatch):
  """That of docs/extending.md, as it stands there: it trains on a mesh as on one device."""
  lion = new_name(monkeypatch, OptimizerName, "lion")
  monkeypatch.setitem(optimizers.OPTIMIZERS, lion, None)  # so that it is taken out again
  exec(compile(example("OptimizerRecord"), "docs/extending.md", "exec"), {})
  one = train_losses(lion, {})
  assert one[-1] < one[0] - 0.05
  on_mesh = train_losses(lion, MESHES[1])
  assert on_mesh == pytest.approx(one, rel=1e-3)  # the sign of small gradients
  config = toy_config({"optimizer.name": lion})
  momentum = sum(leaf.size for leaf in jax.tree.leaves(optimizers.abstract_state(config)))
  assert momentum == sum(p.size for p in cost.parameters(config.model).values()) + 2  # and counters


def test_bias_update_by_hand():
  """Total 10 over 4 experts, mean 2.5: above it down, below it up by u; then centred."""
  bias = updated_bias(jnp.zeros((1, 4)), jnp.array([[7, 2, 1, 0]]), 0.001)
  want = np.array([-1, 1, 1, 1]) * 0.001
  np.testing.assert_allclose(bias, [want - want.mean()], atol=1e-9)
  even = updated_bias(jnp.zeros((1, 4)), jnp.array([[3, 3, 3, 3]]), 0.001)
  np.testing.assert_array_equal(even, np.zeros((1, 4)))
  # Counts beyond float32's integers still have the right sign.
  big = jnp.array([[2**28 + 1, 2**28 - 1, 2**28, 2**28]])
  moved = updated_bias(jnp.zeros((1, 4)), big, 1.0)
  assert np.sign(moved).tolist() == [[-1, 1, 0, 0]]


@pytest.mark.parametrize(
  ("schedule", "expected"),
  [
    # step: 0 is 1/10 of the peak, 9 the peak; 55 is halfway between warm-up and end
    ("cosine", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
    ("wsd", {0: 0.1, 9: 1.0, 55: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ("constant", {0: 0.1, 9: 1.0, 55: 1.0, 100: 1.0}),
  ],
)
def test_schedules_by_hand(schedule, expected):
  settings = Optimizer(learning_rate=1.0, warmup_steps=10, schedule=Schedule(schedule))
  rate = optimizers.schedule(settings, steps=100)
  for step, value in expected.items():
    assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


def test_a_huge_gradient_is_clipped_to_norm_1():
  clipped, params = Optimizer(clip_norm=1.0), draw(STACKED, 0)
  transform = optimizers.make_optimizer(clipped, 10)
  huge = {name: 1e6 * np.ones_like(weight) for name, weight in params.items()}
  _, state = jax.jit(lambda p: transform.update(huge, transform.init(p), p))(params)
  moments = state[1][0].mu.values()
  norm = np.sqrt(sum(float(jnp.sum((m / (1 - clipped.b1)) ** 2)) for m in moments))
  assert norm == pytest.approx(1.0, rel=1e-4)
