"""A Switch Transformer decoder: top-1 of 64 experts in every other layer (2101.03961).

Question   How far does top-1 routing with dropped tokens get, and how many tokens does it drop?
Command    python train.py --config=configs/switch_small.py --workdir=runs/switch_small
           prepare lm1b first (tfds build lm1b); --config.data.name=python_stdlib needs no network
Hardware   one accelerator of 40 GB or more; on N of them add --config.mesh.expert=N
Time       not measured yet
Expect     published for Switch-Base against T5-Base: -0.17 nats at 100k steps and equal FLOPs;
           under 1% of tokens dropped after the balance loss has balanced the experts; large sparse
           models are unstable (2202.08906, section 3): after a step that is not finite, the run
           goes on from its newest checkpoint
"""

from moe_jax.config import (
  Config,
  Data,
  Dtype,
  Eval,
  Health,
  Loss,
  Model,
  MoE,
  OnNonfinite,
  Optimizer,
  Remat,
  Router,
  Train,
)


def get_config() -> Config:
  return Config(
    model=Model(
      num_layers=8,
      dim=512,
      num_heads=8,
      num_kv_heads=8,
      head_dim=64,
      ffn_dim=1536,
      compute_dtype=Dtype.BFLOAT16,
      remat=Remat.DOTS,
      moe=MoE(
        num_experts=64,
        top_k=1,
        router=Router.SWITCH,
        expert_dim=1536,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        jitter=0.01,
        every=2,
      ),
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
    health=Health(on_nonfinite=OnNonfinite.REWIND),
  )
