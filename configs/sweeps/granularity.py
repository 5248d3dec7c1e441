"""One large expert, two, or eight small ones of sixty-four; and one that is always on?

All at the same FLOPs per token, with the width of an expert solved for: top-1 of 8 (Switch), top-2
of 8 (GShard, Mixtral), 8 of 64 (DeepSeekMoE), and the same with one of the experts shared.

Honest failures: routing noise at a tiny width, experts of 30 channels, a balance loss that is not
tuned again for 64 experts; the published gains came at 2B parameters and 100B tokens. Finer experts
also cost time, on every device.
"""

from configs.sweeps import parts, tuned
from moe_jax.sweep import Sweep, arm, match


def get_sweep() -> Sweep:
  def moe(**fields):
    return match("moe", by="flops_per_token", **fields)

  return Sweep(
    base="configs/lab_moe.py",
    arms=[
      arm("dense", tuned.DENSE, parts.DENSE),
      arm("top1", tuned.TOP1, parts.TOP1),
      arm("top2", tuned.TOP2),
      arm("top1-shared", tuned.TOP1, moe(top_k=1, shared_experts=1)),
      arm("fine", tuned.FINE, parts.FINE),
      arm("fine-shared", tuned.FINE, moe(num_experts=64, top_k=7, shared_experts=1)),
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
