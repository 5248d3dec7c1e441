"""Mixtral's block at a size for one accelerator: 8 experts, top-2, in every layer (2401.04088).

Question   none; it is a base for ablations at a size at which experts specialise
Command    python train.py --config=configs/mixtral_small.py --workdir=runs/mixtral_small
           prepare lm1b first (tfds build lm1b); --config.data.name=python_stdlib needs no network
Hardware   one accelerator of 40 GB or more; on N of them add --config.mesh.expert=N
Time       not measured yet
Expect     197M parameters, 55M active per token; no published figure at this size
"""

from moe_jax.config import Config, Data, Dtype, Eval, Loss, Model, MoE, Optimizer, Remat, Train


def get_config() -> Config:
  return Config(
    model=Model(
      num_layers=12,
      dim=512,
      num_heads=8,
      num_kv_heads=2,
      head_dim=64,
      ffn_dim=2560,
      rope_base=1_000_000.0,
      tied_head=False,
      compute_dtype=Dtype.BFLOAT16,
      remat=Remat.FULL,
      moe=MoE(num_experts=8, top_k=2, expert_dim=1280, capacity_factor=1.25),
    ),
    data=Data(
      name="lm1b",
      train_split="train",
      validation_split="test[:50%]",
      test_split="test[50%:]",
      seq_len=1024,
      batch_size=64,
    ),
    loss=Loss(load_balance=0.01, router_z=1e-3),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=1000),
    train=Train(steps=50_000, log_every=50, eval_every=1000, checkpoint_every=1000),
    eval=Eval(batches=32, final_batches=512),
  )
