"""Is one large expert better, or two, or eight small ones of 64; and does a shared expert help?

All arms have the same FLOPs per token, for which the width of an expert is solved: top-1 of 8
(Switch), top-2 of 8 (GShard, Mixtral), 8 of 64 (DeepSeekMoE), and variants of top-1 and 8 of 64 in
which one of the experts is shared.

Possible failures: routing is noisy at a tiny width, experts have 30 channels, and the balance loss
is not tuned again for 64 experts; the published gains came at 2B parameters and 100B tokens. Finer
experts also take more time, on every device.
"""

from configs.arms import changes, rates
from moe_jax.sweep import Sweep, arm, match


def get_sweep() -> Sweep:
  def moe(**fields):
    return match("moe", by="flops_per_token", **fields)

  return Sweep(
    base="configs/lab_moe.py",
    arms=[
      arm("dense", rates.DENSE, changes.DENSE),
      arm("top1", rates.TOP1, changes.TOP1),
      arm("top2", rates.TOP2),
      arm("top1-shared", rates.TOP1, moe(top_k=1, shared_experts=1)),
      arm("fine", rates.FINE, changes.FINE),
      arm("fine-shared", rates.FINE, moe(num_experts=64, top_k=7, shared_experts=1)),
    ],
    target="top2",
    evaluate=("--routing",),
    published=(
      "loss on the Pile at 2B: dense 2.060, Switch 1.881, GShard 1.867, DeepSeekMoE 1.808 "
      "(2401.06066 table 1)"
    ),
    band=(
      "top2 below dense by 0.03 to 0.07; top1 above top2, and perhaps above dense; fine within "
      "0.01 of top2 at this length (a pilot saw no effect); shared within 0.01 of not shared"
    ),
  )
