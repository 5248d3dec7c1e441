"""Does expert choice see the future, and how much of its loss is that?

An expert that picks its tokens among all of a group compares later tokens with earlier ones, so
whether a token is computed tells something of what follows. The causal evaluation hides the future:
the tokens after t are another row's while t is predicted. For a causal router the gap is exactly 0.

Honest failure: so small a model at so short a training need not have learnt to use the leak, and
then hiding the future costs nothing; that the leak is there is shown exactly by perturbing the last
token (tests/moe/test_routers.py).
"""

from configs.sweeps import parts, tuned
from moe_jax.sweep import Sweep, arm


def get_sweep() -> Sweep:
  return Sweep(
    base="configs/lab_moe.py",
    arms=[
      arm("token_choice", tuned.TOP2, parts.DROPLESS),
      arm("expert_choice-128", tuned.EXPERT_CHOICE, parts.EXPERT_CHOICE,
          {"model.moe.group_size": 128}),
      arm("expert_choice-1024", tuned.EXPERT_CHOICE, parts.EXPERT_CHOICE),
    ],
    target="token_choice",
    evaluate=("--causal",),
    published="loss drops by 10%, abnormally, as the group shrinks from 8192 to 512 (2408.15664)",
    band="gap exactly 0 for token choice, not 0 for expert choice; losses within 0.02",
  )  # fmt: skip
