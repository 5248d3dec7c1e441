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

from configs import tiny_moe
from moe_jax.config import Config, Train, override


def get_config() -> Config:
  return override(
    tiny_moe.get_config(),
    {
      "data.name": "tiny_shakespeare",
      "optimizer.warmup_steps": 50,
      "train": Train(steps=750, log_every=25, eval_every=75, checkpoint_every=75),
      "eval.batches": 0,  # the whole split is small
    },
  )
