"""docs/config.md is written from the config and is not out of date."""

from moe_jax.config import Dispatch
from moe_jax.config import docs as config_docs
from tests.support.toys import ROOT


def test_the_page_is_fresh():
  stale = "stale: python -m moe_jax.config.docs > docs/config.md"
  assert (ROOT / "docs/config.md").read_text() == config_docs.markdown(), stale


def test_a_row_of_the_page():
  page = config_docs.markdown()
  row = "| `head_dim` | `32` | Width of a head (A), even. | at least 1 |"
  assert row in page and "| above 0; inf is no limit |" in page
  assert f"- `grouped`: {Dispatch.GROUPED.meaning}" in page
  assert "| `dispatch` | `gather` |" in page and "[Dispatch](#dispatch) |" in page
