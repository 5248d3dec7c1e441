"""Eight simulated CPU devices for every test; set before jax starts its backend."""

import os

from tests.support import xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla.flags(devices=8)
# XLA's collectives need a thread per simulated device, or they deadlock on few cores.
os.environ["PJRT_NPROC"] = "32"

import jax
import pytest

from moe_jax.config import Data
from tests.support.scripts import ONE_DEVICE, WITHOUT_THREADS, Run, built, train
from tests.support.toys import mesh_of

assert jax.device_count() == 8, "the tests need their eight simulated devices"
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
  """The longest files first, so that no worker is left alone with one, nor steals a half of it."""
  first = (
    "test_readme.py", "test_remote_runs.py", "test_real_runs.py", "test_train_script.py",
    "test_train.py", "test_families.py", "test_init_from.py", "test_eval_script.py",
    "test_golden_run.py", "test_layer.py",
  )  # fmt: skip
  items.sort(
    key=lambda item: first.index(item.path.name) if item.path.name in first else len(first)
  )


@pytest.fixture
def one_device():
  with jax.set_mesh(mesh_of()):
    yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
  """One folder for all workers of this test run; support.scripts.built() builds a thing in it."""
  base = tmp_path_factory.getbasetemp()
  return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def cache(shared_folder):
  """The cache of this test run, of this process and of the scripts that it starts."""
  folder = shared_folder / "cache"
  for environment in (os.environ, WITHOUT_THREADS, ONE_DEVICE):
    environment["MOE_JAX_CACHE"] = str(folder)
  return folder


@pytest.fixture(scope="session")
def whole_run(shared_folder, cache):
  """A run of 12 steps. Tests only read it: another worker may read it too."""
  path, said = built(shared_folder / "whole", lambda path: {"output": train(path / "run", cache)})
  return Run(path / "run", said["output"])


@pytest.fixture(scope="session")
def stdlib():
  """python_stdlib, prepared once."""
  return Data()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
  """A cache that only this test uses."""
  monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "own_cache"))
  return tmp_path / "own_cache"


@pytest.fixture
def text(tmp_path):
  """A config for the test's own files in tmp_path / "files"."""
  (tmp_path / "files").mkdir()
  return Data(name="text", path=str(tmp_path / "files"))
