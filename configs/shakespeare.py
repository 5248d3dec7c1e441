"""The character-level Shakespeare that nanoGPT made famous, with experts.

Question   What does an MoE reach on tiny Shakespeare in nanoGPT's laptop budget?
Command    python train.py --config=configs/shakespeare.py --workdir=runs/shakespeare
           TFDS downloads the text; that needs `pip install tensorflow-cpu`. Or take the file
           itself, data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn, and add
           --config.data.name=text --config.data.path=input.txt (cut 90/5/5 in the same order)
Hardware   2 CPU cores
Time       3 minutes
Expect     a validation loss of 1.485 nats per character; nanoGPT's README names 1.88 in about three
           minutes of a laptop's CPU (4 layers of width 128, 2,000 steps of 12 x 64 characters)
"""

from moe_jax.config import Config, Data, Eval, Model, MoE, Optimizer, OptimizerName, Remat, Train


def get_config() -> Config:
  return Config(
    model=Model(
      num_layers=4,
      dim=128,
      num_heads=2,
      num_kv_heads=1,
      head_dim=64,
      qk_norm=True,
      tied_head=False,
      ffn_dim=384,
      remat=Remat.DOTS,
      moe=MoE(num_experts=8, top_k=2, expert_dim=192, capacity_factor=1.25),
    ),
    data=Data(name="tiny_shakespeare", tokenizer="bytes", seq_len=128, batch_size=16),
    optimizer=Optimizer(
      name=OptimizerName.MUON, learning_rate=1e-2, warmup_steps=50, final_fraction=0.02
    ),
    train=Train(steps=750, log_every=25, eval_every=75, checkpoint_every=75),
    eval=Eval(batch_size=64, batches=0),
  )
