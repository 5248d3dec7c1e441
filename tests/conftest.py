"""Eight simulated CPU devices for every test; set before jax starts its backend."""

import enum
import os
import pathlib
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles faster
)
# XLA's collectives need a thread per simulated device, or they deadlock on few cores.
os.environ["PJRT_NPROC"] = "32"

import jax
import pytest

from moe_jax import config as config_lib
from moe_jax import sharding

assert jax.device_count() == 8, "the tests need their eight simulated devices"
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
  """The longest test first, so that no worker is left alone with it."""
  items.sort(key=lambda item: item.path.name != "test_readme.py")


def mesh_of(**axes: int) -> jax.sharding.Mesh:
  """A mesh of the first devices: mesh_of(expert=4, data=2)."""
  return sharding.make_mesh(config_lib.Mesh(**{"data": 1} | axes))


def toy_config(**moe) -> config_lib.Config:
  """A few thousand parameters in odd sizes; every mesh axis can be 2, data and expert 4."""
  moe = {"num_experts": 4, "top_k": 2, "expert_dim": 18} | moe
  return config_lib.Config(
    model=config_lib.Model(
      vocab_size=24, num_layers=2, dim=10, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=14,
      moe=config_lib.MoE(**moe),
    ),
    data=config_lib.Data(seq_len=9, batch_size=8),
    optimizer=config_lib.Optimizer(warmup_steps=1, learning_rate=0.01),
    train=config_lib.Train(steps=10, eval_every=5, checkpoint_every=5),
    mesh=config_lib.Mesh(data=1),
  )  # fmt: skip


def slow_unless(everyday, names):
  """The names as parameters of a test: those that are not in `everyday` are marked slow."""
  return [
    pytest.param(name, marks=[] if name in everyday else [pytest.mark.slow]) for name in names
  ]


def example(mentions: str) -> str:
  """The code block of docs/extending.md that mentions something."""
  page = (pathlib.Path(__file__).parent.parent / "docs/extending.md").read_text()
  (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.S) if mentions in c)
  return code


def new_name(monkeypatch: pytest.MonkeyPatch, kind: type[enum.Enum], value: str) -> enum.Enum:
  """A member that is not in an enum of the config, while a test runs."""
  member = object.__new__(kind)
  member._name_, member._value_ = value.upper(), value
  monkeypatch.setattr(kind, value.upper(), member, raising=False)
  return member


@pytest.fixture
def one_device():
  with jax.set_mesh(mesh_of()):
    yield
