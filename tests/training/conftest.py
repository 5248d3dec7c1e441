"""Text for runs that a test of this folder trains."""

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A folder of forty documents."""
  folder = tmp_path_factory.mktemp("data") / "text"
  folder.mkdir()
  for n in range(40):
    (folder / f"{n}.txt").write_text(f"document {n} is about the number {n}. " * 40)
  return folder
