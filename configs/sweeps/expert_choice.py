"""Does expert choice see the future, and how much does that lower its loss?

An expert that picks its tokens among all tokens of a group compares later tokens with earlier ones.
So whether a token is computed depends on the tokens after it. The causal evaluation hides the
future: to predict from token t, it replaces the tokens after t by another row's. For a causal
router the two losses are equal, a gap of exactly 0.

Possible failure: so small a model may not learn in so short a training to use later tokens, and
then hiding them costs nothing. That the router depends on later tokens is tested exactly, by
changing the last token (tests/moe/test_routers.py).
"""

from configs.arms import changes, rates
from moe_jax.sweep import Sweep, arm


def get_sweep() -> Sweep:
  return Sweep(
    base="configs/lab_moe.py",
    arms=[
      arm("token_choice", rates.TOP2, changes.DROPLESS),
      arm(
        "expert_choice-128",
        rates.EXPERT_CHOICE,
        changes.EXPERT_CHOICE,
        {"model.moe.group_size": 128},
      ),
      arm("expert_choice-1024", rates.EXPERT_CHOICE, changes.EXPERT_CHOICE),
    ],
    target="token_choice",
    evaluate=("--causal",),
    published="loss drops by 10%, abnormally, as the group shrinks from 8192 to 512 (2408.15664)",
    band="gap exactly 0 for token choice, not 0 for expert choice; losses within 0.02",
  )
