"""The description that is printed before a run starts."""

from moe_jax.config import Router
from moe_jax.model import cost
from tests.support.toys import toy_config


def test_describe_says_what_is_not_causal():
  """Before a run starts: its loss is not a language model's."""
  report = cost.report(toy_config(router=Router.EXPERT_CHOICE, renormalize=False), ())
  assert report.count("not causal") == 2 and "in evaluation, so its loss looks too good" in report
  assert "not causal" not in cost.report(toy_config(), ())
