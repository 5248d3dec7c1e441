"""tiny_moe with DeepSeek-V3's routing: small and shared experts, a balancing bias, no drops.

Question   Do fine-grained and shared experts with loss-free balancing help at equal active size?
           (2401.06066, 2408.15664, 2412.19437)
Command    python train.py --config=configs/tiny_deepseek.py --workdir=runs/tiny_deepseek
Hardware   2 CPU cores, 2 GiB of memory
Time       not measured yet
Expect     the active size of tiny_moe (4 routed and 2 shared experts, each a third of one of
           tiny_moe's two); nothing dropped; MaxVio falls while the biases settle
"""

from configs import tiny_moe
from moe_jax.config import Config, Dispatch, Loss, MoE, Score, override


def get_config() -> Config:
  moe = MoE(
    num_experts=16,
    top_k=4,
    expert_dim=64,
    shared_experts=2,
    score=Score.SIGMOID,
    gate_scale=1.0,
    expert_groups=4,
    top_groups=2,
    bias_update_rate=1e-3,
    dispatch=Dispatch.GROUPED,
  )
  loss = Loss(load_balance=0.0, router_z=1e-3)
  return override(tiny_moe.get_config(), {"model.moe": moe, "loss": loss})
