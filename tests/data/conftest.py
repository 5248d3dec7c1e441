"""Data configs of the tests in this folder."""

import pytest

from moe_jax.config import Data


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
