"""The dense twin of tiny_moe: the same active parameters, data, order, schedule and loss.

Question   How much lower is the loss with experts, at equal compute per token?
Command    python train.py --config=configs/tiny_dense.py --workdir=runs/tiny_dense
Hardware   2 CPU cores
Time       about 3 minutes
Expect     active parameters within 1% of tiny_moe's (they differ by the router); compare the
           validation losses of the two runs, which are language-model losses alone
"""

from configs import tiny_moe
from moe_jax.config import Config, MoE, override


def get_config() -> Config:
  return override(tiny_moe.get_config(), {"model.moe": MoE(num_experts=0)})
