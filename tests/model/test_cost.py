"""Parameter counts against arithmetic by hand, and the description printed before a run."""

import importlib

import pytest

from moe_jax.config import Router
from moe_jax.model import cost
from tests.support.toys import toy_config


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
  first, second = (line.strip() for line in cost.report(config, ()).splitlines()[1:3])
  assert first.endswith(
    "46.70B total, 12.88B active per token (27.6%) with embedding and head, as Mixtral counts"
  )
  assert second == "46.44B total, 12.62B active without both, as Qwen counts (non-embedding)"


@pytest.mark.parametrize(("tied", "matrices"), [(True, 1), (False, 2)])
def test_a_tied_head_is_the_embedding(tied, matrices):
  config = toy_config()
  config.model.tied_head = tied
  counts = cost.count(config)
  assert counts.embedding == matrices * 24 * 10
  # Per layer: attention, router, two norms, and 4 or 2 experts of three matrices; the last norm.
  other = 2 * 10 * 24 + 2 * 10 * 12 + 10 * 4 + 2 * 10
  assert counts.total - counts.embedding == 2 * (other + 4 * 3 * 10 * 18) + 10
  assert counts.active - counts.embedding == 2 * (other + 2 * 3 * 10 * 18) + 10


def test_describe_says_what_is_not_causal():
  """Before a run starts: its loss is not a language model's."""
  report = cost.report(toy_config(router=Router.EXPERT_CHOICE, renormalize=False), ())
  assert report.count("not causal") == 2 and "in evaluation, so its loss looks too good" in report
  assert "not causal" not in cost.report(toy_config(), ())
