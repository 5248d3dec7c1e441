"""Over which tokens should the balance loss ask for balance?

Over each sequence, over each microbatch, or over the whole batch (2501.11873). The smaller the
scope, the less an expert may specialise: a sequence of one domain must then use all experts alike.
Four microbatches of two rows make a step, so the three scopes differ; nothing is dropped.

Possible failure: the published gain of 1.6% came with 120B tokens; here the losses may differ by
less than the seeds do. That the global loss of microbatches equals that of the full batch is exact,
and tests/training/test_train.py tests it.
"""

from configs.arms import changes, rates
from moe_jax.sweep import Sweep, arm


def get_sweep() -> Sweep:
  common = changes.DROPLESS | {"train.accumulation": 4, "model.moe.group_size": 0}
  return Sweep(
    base="configs/lab_moe.py",
    arms=[
      arm(scope, rates.TOP2, common, {"loss.balance_scope": scope})
      for scope in ("sequence", "microbatch", "global")
    ],
    target="sequence",
    evaluate=("--routing",),
    published="perplexity 8.167 to 8.038, and experts that specialise (2501.11873, 3.4B-A0.6B)",
    band=(
      "domain separation of the experts higher with global than with sequence scope; loss of "
      "global between 0 and 0.01 better"
    ),
  )
