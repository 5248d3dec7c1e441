"""Data configs of the tests in this folder."""

import pytest

from moe_jax.config import Data


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory):
  """python_stdlib, prepared once."""
  return Data(cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def text(tmp_path):
  """A config for the test's own files in tmp_path / "files"."""
  (tmp_path / "files").mkdir()
  return Data(name="text", path=str(tmp_path / "files"), cache_dir=str(tmp_path / "cache"))
