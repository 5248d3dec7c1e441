"""Parameter counts against arithmetic by hand, and the description printed before a run."""

import importlib
import time

import jax
import pytest

import moe_jax
from moe_jax.analysis import evaluation
from moe_jax.config import Config, Delta, Mesh, Router, override
from moe_jax.errors import UserError
from moe_jax.kernels import platform
from moe_jax.model import cost
from moe_jax.moe import validation
from moe_jax.storage import workdir
from moe_jax.training import optimizers
from moe_jax.training import setup as setup_lib
from moe_jax.training.step import compile_step
from tests.support import scripts
from tests.support.toys import mesh_of, toy_batch, toy_config


def test_mixtral_8x7b():
  """Mixtral 8x7B has width 4096, 32 layers, 32 query and 8 key/value heads of 128, 8 experts of
  14336 of which a token uses 2, and a vocabulary of 32000 with a head of its own.

      attention   2 * 4096 * 32*128 + 2 * 4096 * 8*128             41,943,040
      one expert  3 * 4096 * 14336                                176,160,768
      router      4096 * 8                                             32,768
      two norms   2 * 4096                                              8,192
      a layer     attention + 8 experts + router + norms        1,451,270,144
      used of it  attention + 2 experts + router + norms          394,305,536
      embedding and head   2 * 32000 * 4096                       262,144,000
      last norm                                                         4,096
      total       32 layers + embedding and head + last norm   46,702,792,704
      active      the same of the used parts                   12,879,925,248
      without embedding and head: 46,440,648,704 total, 12,617,781,248 active
  """
  config = importlib.import_module("configs.mixtral_8x7b").get_config()
  counts = cost.count(config)
  assert counts.total == 46_702_792_704 and counts.active == 12_879_925_248
  assert counts.embedding == 262_144_000
  first, second = (line.strip() for line in cost.cost_report(config, ()).splitlines()[1:3])
  assert first.endswith(
    "46.7B total, 12.88B active per token (27.6%) with embedding and head, as Mixtral counts"
  )
  assert second == "46.44B total, 12.62B active without both, as Qwen counts (non-embedding)"


@pytest.mark.parametrize(("tied", "matrices"), [(True, 1), (False, 2)])
def test_a_tied_head_is_the_embedding(tied, matrices):
  config = toy_config({"model.tied_head": tied})
  counts = cost.count(config)
  assert counts.embedding == matrices * 24 * 10
  # Per layer: attention, router, two norms, and 4 or 2 experts of three matrices; the last norm.
  other = 2 * 10 * 24 + 2 * 10 * 12 + 10 * 4 + 2 * 10
  assert counts.total - counts.embedding == 2 * (other + 4 * 3 * 10 * 18) + 10
  assert counts.active - counts.embedding == 2 * (other + 2 * 3 * 10 * 18) + 10
  # Norms are no matrices; the head is, tied or not. Each of 9 queries sees 5 keys on average.
  matmul = 2 * (other - 2 * 10 + 2 * 3 * 10 * 18) + 24 * 10
  assert counts.flops_per_token == 6 * (matmul + 2 * 4 * (6 + 6) * 5)


def test_describe_says_what_is_not_causal():
  """Before a run starts: its loss is not a language model's."""
  report = cost.cost_report(toy_config(router=Router.EXPERT_CHOICE, renormalize=False), ())
  assert report.count("not causal") == 2 and "in evaluation, so its loss looks too good" in report
  assert "not causal" not in cost.cost_report(toy_config(), ())


@pytest.mark.parametrize(
  ("device", "fsdp", "verdict"),
  [
    ("v5e", 4, "v5e                does not fit: 31.51 GiB and temporary arrays, of its 16.00 GiB"),
    ("v5p", 8, "v5p                fits: 15.76 GiB and temporary arrays, of its 95.00 GiB"),
    ("h100", 8, "h100               fits: 15.76 GiB and temporary arrays, of its 74.51 GiB"),
  ],
)
def test_describe_says_whether_a_named_device_suffices(device, fsdp, verdict):
  """By the vendor's figures, without that device."""
  mixtral = ["--config=configs/mixtral_8x7b.py", f"--config.mesh.fsdp={fsdp}"]
  done = scripts.call("train.py", *mixtral, "--describe", f"--device={device}")
  assert done.returncode == 0 and done.stdout.splitlines()[-1] == verdict, done
  line = scripts.refused("train.py", *mixtral, "--describe", "--device=H2O")
  assert "--device: invalid choice: 'H2O'" in line and all(name in line for name in ("v4", "h200"))
  line = scripts.refused("train.py", *mixtral, f"--device={device}")
  assert "belongs to --describe" in line


def debug_config(**fields) -> Config:
  config = importlib.import_module("configs.debug").get_config()
  changed = {name.replace("__", "."): value for name, value in fields.items()}
  return override(config, changed | {"mesh.data": 1}, "here")


TOO_LARGE = [
  (dict(model__dim=4_000_000), "config.model.vocab_size=264 or config.model.dim=4000000"),
  (dict(model__vocab_size=2**31 - 1), "config.model.vocab_size=2147483647 or config.model.dim=32"),
  (dict(model__num_layers=10_000, model__ffn_dim=10**5, model__moe__num_experts=0),
   "config.model.num_layers=10000 or config.model.ffn_dim=100000 or config.model.dim=32"),
  (dict(model__moe__num_experts=10**7, model__moe__expert_dim=10**5),
   "config.model.moe.num_experts=10000000 or config.model.moe.expert_dim=100000 or "),
  (dict(model__moe__shared_experts=10**9), "config.model.moe.shared_experts=1000000000 or "),
  (dict(model__num_heads=10**9), "config.model.num_heads=1000000000 or config.model.head_dim=16"),
  (dict(model__latent__kv_dim=10**9, model__num_kv_heads=2, model__latent__rotary_dim=8,
        model__latent__value_dim=16),
   "config.model.latent.kv_dim=1000000000 or config.model.num_heads=2 or "),
  (dict(model__delta__value_heads=10**9),
   "config.model.delta.key_heads=2 or config.model.delta.value_heads=1000000000"),
  (dict(data__batch_size=10**5), "config.data.batch_size=100000, config.data.seq_len=64"),
  (dict(model__num_layers=4_000, data__batch_size=64, data__seq_len=1024),
   "config.model.num_layers=4000, or raise config.train.accumulation=1"),
  (dict(eval__batch_size=3 * 10**6), "config.eval.batch_size=3000000"),
]  # fmt: skip


# Everyday: a weight, a part of a layer, activations, evaluation.
@pytest.mark.parametrize(
  ("fields", "remedy"),
  [
    pytest.param(*case, marks=[] if number in (0, 3, 9, 10) else [pytest.mark.slow])
    for number, case in enumerate(TOO_LARGE)
  ],
  ids=lambda value: str(value)[:30],
)
def test_what_no_device_can_hold_is_refused_at_once(fields, remedy):
  config = debug_config(**fields)
  validation.validate(config)
  start = time.process_time()
  with pytest.raises(UserError, match=r"at least \d.*[GT]iB on each device, which has") as error:
    cost.check_training_memory(config, optimizers.abstract_state(config))
  assert time.process_time() - start < 10  # seconds; from shapes alone it takes one
  assert remedy in str(error.value) and "\n" not in str(error.value)


def test_what_fits_passes():
  config = debug_config()
  cost.check_training_memory(config, optimizers.abstract_state(config))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_no_run_is_refused_that_would_fit(optimizer, monkeypatch):
  """The check asks for no more than the compiled step takes, and for half of its state at least."""
  config = toy_config()
  config = override(config, {"optimizer.name": optimizer, "model.dim": 64}, "here")
  mesh = mesh_of()
  with jax.set_mesh(mesh):
    setup = setup_lib.make(config, mesh)
    batch = jax.tree.map(_shape, toy_batch(config))
    step = compile_step(setup).lower(setup.shapes, batch).compile()
  taken = step.memory_analysis()
  state = optimizers.abstract_state(config)
  for memory, fits in (
    (taken.argument_size_in_bytes + taken.temp_size_in_bytes, True),
    (taken.argument_size_in_bytes // 2, False),
  ):
    monkeypatch.setattr(platform, "memory_bytes", lambda memory=memory: memory)
    if fits:
      cost.check_training_memory(config, state)
    else:
      with pytest.raises(UserError):
        cost.check_training_memory(config, state)


def _shape(array):
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


def test_a_mesh_divides_what_a_device_holds(monkeypatch):
  """Over 4 devices, each holds a quarter of the experts and of the batch."""
  config = toy_config({"mesh": Mesh(data=1)}, num_experts=8, expert_dim=500)
  state = optimizers.abstract_state(config)
  whole = cost.state_bytes(config, state)
  monkeypatch.setattr(platform, "memory_bytes", lambda: 0.6 * whole)
  with pytest.raises(UserError, match=r"moe.num_experts=8 or .* or take more devices"):
    cost.check_training_memory(config, state)
  config = override(config, {"mesh": Mesh(data=1, expert=4)})
  cost.check_training_memory(config, state)


@pytest.mark.parametrize(
  ("fields", "why"),
  [
    (dict(model__dim=10**7), "^weights: at least .*lower config.model.vocab_size=264 or "),
    (dict(eval__batch_size=3 * 10**6), "logits of an evaluation of 3000000 sequences"),
  ],
)
def test_a_run_that_this_machine_cannot_hold_is_not_read(fields, why, tmp_path):
  """Its config.json is enough to say so; there are no checkpoints here."""
  workdir.write_config(tmp_path, debug_config(**fields))
  with pytest.raises(UserError, match=why):
    evaluation.LoadedRun(str(tmp_path), 0, "validation")
  if "model__dim" in fields:
    with pytest.raises(UserError, match=why):
      moe_jax.load(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_delta_rule_costs_the_same_at_every_length():
  """By hand: 2 FLOPs for each weight of a matrix, and three products with the state, three times
  over; in two layers, and none of attention."""
  config = toy_config(
    {"model.delta": Delta(value_heads=6, key_heads=2, key_dim=5, value_dim=3)}, num_experts=0
  )
  channels, projected = 2 * 2 * 5 + 6 * 3, 2 * 2 * 5 + 2 * 6 * 3 + 2 * 6
  layer = 10 * projected + channels * 4 + 6 * 3 * 10 + 3 * 10 * 14
  want = 3 * 2 * (24 * 10 + 2 * (layer + 3 * 6 * 5 * 3))
  for length in (9, 90):
    config = override(config, {"data.seq_len": length})
    assert cost.count(config).flops_per_token == want
