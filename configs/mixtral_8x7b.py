"""Mixtral 8x7B (2401.04088): 32 layers, d 4096, 8 experts of 14336, top-2, 32 heads on 8.

Question   What does the published model cost? The config is for --describe and for compiling, and
           has the shapes of Mixtral's published weights.
Command    python train.py --config=configs/mixtral_8x7b.py --describe
Hardware   for --describe any; for training 64 accelerators (fsdp 8 x expert 8) of 40 GB: --describe
           counts 15.8 GiB on each, and a step that was compiled for v5p takes 30.4
Time       --describe: seconds
Expect     46.7B parameters, 12.88B active per token; 79.7 GFLOPs per token at sequence 4096
"""

from moe_jax.config import (
  Config,
  Data,
  Dtype,
  Eval,
  Loss,
  Mesh,
  Model,
  MoE,
  Optimizer,
  Remat,
  Train,
)


def get_config() -> Config:
  return Config(
    model=Model(
      vocab_size=32_000,
      num_layers=32,
      dim=4096,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      ffn_dim=14_336,
      rope_base=1_000_000.0,
      tied_head=False,
      compute_dtype=Dtype.BFLOAT16,
      remat=Remat.FULL,
      moe=MoE(num_experts=8, top_k=2, expert_dim=14_336, capacity_factor=1.25),
    ),
    data=Data(name="c4/en", tokenizer="tokenizer.model", seq_len=4096, batch_size=256),
    loss=Loss(load_balance=0.01, router_z=1e-3),
    optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2000),
    train=Train(steps=100_000, log_every=10, eval_every=1000, checkpoint_every=1000),
    eval=Eval(batches=8, final_batches=64),
    mesh=Mesh(fsdp=8, expert=8),
  )
