"""Data configs of the tests in this folder."""

import pytest

from moe_jax.config import Data


@pytest.fixture
def text(tmp_path):
  """A config for the test's own files in tmp_path / "files"."""
  (tmp_path / "files").mkdir()
  return Data(name="text", path=str(tmp_path / "files"))
