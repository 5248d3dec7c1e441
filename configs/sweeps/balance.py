"""What happens to an MoE without a balance loss, and is a balancing bias as good as the loss?

A router that has found two good experts has no reason to try the others. Top-1 and top-2 with and
without the Switch loss (2101.03961 eq. 4), and loss-free balancing by a bias (2408.15664) against
the loss at its paper's weight, with sigmoid scores in both. Nothing is dropped, so the loss shows
what imbalance and balancing themselves cost; the capacity sweep shows what drops cost.

Possible failures: eight experts of a small model may partly balance without help; in OLMoE the
effect of imbalance on the loss showed only after billions of tokens; with an update rate of 1e-3
the biases need some hundred steps to grow large enough.
"""

from configs.arms import changes, rates
from moe_jax.sweep import Sweep, arm


def get_sweep() -> Sweep:
  sigmoid = changes.SIGMOID | changes.DROPLESS
  return Sweep(
    base="configs/lab_moe.py",
    arms=[
      arm("top2-none", rates.TOP2, changes.DROPLESS, changes.NO_BALANCE),
      arm("top2-aux", rates.TOP2, changes.DROPLESS),
      arm("top1-none", rates.TOP1, changes.DROPLESS, changes.NO_BALANCE, changes.TOP1),
      arm("top1-aux", rates.TOP1, changes.DROPLESS, changes.TOP1),
      arm("sigmoid-aux", rates.SIGMOID, sigmoid, {"loss.load_balance": 1e-3}),
      arm("sigmoid-bias", rates.SIGMOID, sigmoid, changes.BIAS),
    ],
    target="top2-aux",
    evaluate=("--routing", "--capacity_factors=1,1.25,2"),
    published=(
      "without a loss OLMoE's first layer sends everything to one expert (2409.02060 figure 10); "
      "MaxVio 0.72 with the loss, 0.04 with the bias, perplexity 0.6% better (2408.15664 table 2)"
    ),
    band=(
      "MaxVio of none at least twice that of aux, for top-1 and top-2; sigmoid-bias at most a "
      "quarter of sigmoid-aux; losses of top-2 within 0.01 of each other, of the sigmoid pair too; "
      "at capacity factor 1 none drops twice what aux drops"
    ),
  )
