"""The smallest run that trains, validates and checkpoints, for working on the code.

Question   Do training, validation and checkpoints still work?
Command    python train.py --config=configs/debug.py --workdir=runs/debug
Hardware   any CPU
Time       about 20 seconds, most of it compilation
Expect     the loss falls from 5.6 to about 3.4 in 30 steps
"""

from moe_jax.config import Config, Data, Eval, Model, MoE, Optimizer, Train


def get_config() -> Config:
  return Config(
    model=Model(
      num_layers=2,
      dim=32,
      num_heads=2,
      num_kv_heads=1,
      head_dim=16,
      moe=MoE(num_experts=4, top_k=2, expert_dim=32),
    ),
    data=Data(seq_len=64, batch_size=8),
    optimizer=Optimizer(learning_rate=1e-2, warmup_steps=5),
    train=Train(steps=30, log_every=5, eval_every=10, checkpoint_every=10),
    eval=Eval(batches=4, final_batches=4),
  )
