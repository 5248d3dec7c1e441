"""The small model of the sweeps: eight experts, top-2, on three labelled domains.

Question   none; the sweeps in configs/sweeps/ change this config, one thing at a time
Command    python sweep.py --sweep=configs/sweeps/balance.py --out=runs/balance
           (or train.py --config=configs/lab_moe.py --workdir=runs/lab)
Hardware   2 CPU cores, 1 GiB of memory
Time       about 1 minute a run
Expect     see docs/reproductions.md
"""

from moe_jax.config import Config, Data, Eval, Loss, Model, MoE, Optimizer, QKNorm, Remat, Train


def get_config() -> Config:
  return Config(
    model=Model(
      num_layers=3,
      dim=96,
      num_heads=4,
      num_kv_heads=4,
      head_dim=24,
      qk_norm=QKNorm.HEAD,
      tied_head=False,
      ffn_dim=256,  # K * expert_dim
      remat=Remat.DOTS,
      moe=MoE(
        num_experts=8,
        top_k=2,
        expert_dim=128,
        capacity_factor=2.0,
        eval_capacity_factor=2.0,
        group_size=1024,
      ),
    ),
    data=Data(name="python_domains", tokenizer="bytes", seq_len=128, batch_size=8),
    loss=Loss(load_balance=0.01, router_z=1e-3),
    optimizer=Optimizer(learning_rate=5e-3, warmup_steps=50, final_fraction=0.02),
    train=Train(steps=800, log_every=10, eval_every=100, checkpoint_every=400, keep_latest=2),
    eval=Eval(batch_size=64, batches=4, final_batches=16),
  )
