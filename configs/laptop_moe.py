"""A model of Python source that a laptop trains in half an hour.

Question   Does a small MoE on two CPU cores beat gzip -9 on text that it has not seen?
Command    python train.py --config=configs/laptop_moe.py --workdir=runs/laptop_moe
Hardware   2 CPU cores, 4 GiB of memory
Time       31 minutes of training, 2 of evaluation
Expect     1.48 bits per byte on the whole validation split, where gzip -9 takes 1.69
"""

from moe_jax.config import Config, Data, Eval, Loss, Model, MoE, Optimizer, Remat, Train


def get_config() -> Config:
  return Config(
    model=Model(
      num_layers=6,
      dim=192,
      num_heads=3,
      num_kv_heads=1,
      head_dim=64,
      ffn_dim=512,
      remat=Remat.DOTS,
      moe=MoE(num_experts=8, top_k=2, expert_dim=256, capacity_factor=1.25),
    ),
    data=Data(name="python_stdlib", tokenizer="bytes", seq_len=512, batch_size=8),
    loss=Loss(load_balance=0.01, router_z=1e-3),
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=100),
    train=Train(steps=1250, eval_every=250, checkpoint_every=250),
    eval=Eval(batches=32),
  )
