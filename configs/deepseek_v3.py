"""DeepSeek-V3 (2412.19437): 61 layers, d 7168, 256 experts of 2048, top-8, latent attention; 671B.

Question   Does the largest open model of its kind fit v5p chips with float32 weights and moments?
           Batches of 15,360 sequences of 4,096 tokens, rate, bias of loss-free balancing and the
           balance loss of each sequence are the paper's, which kept its moments in bfloat16. It
           dropped nothing; here a device takes up to twice its fair share of rows
           (exchange_factor), and what overflows is counted. On 256 chips rows are in slots for 1.25
           times an expert's share, which drops some.
Command    python -m moe_jax.compile --config=configs/deepseek_v3.py:v5p_512 --topology=v5p-512
           python -m moe_jax.compile --config=configs/deepseek_v3.py:v5p_1024 --topology=v5p-1024
Hardware   v5p_1024: 512 chips (fsdp 8 x expert 64, 30 microbatches of a row on each), on each of
           which the compiler reserves 56.1 of 95 GiB; v5p_512: 256 chips (fsdp 32 x expert 8, 60
           microbatches), 85.3 GiB
Time       to compile on 2 CPU cores: v5p_1024 535 CPU-s; v5p_512 468. Predicted, not measured, of a
           step of 62.9M tokens: v5p_1024 556 s, MFU at most 12.1%, half of the cycles for the
           buffers of the ragged exchange; v5p_512 580 s, 23.1%, of which it waits 159 s for rows
Expect     671.0B parameters, 37.55B active per token; never trained
"""

from typing import Any

from configs import published
from moe_jax.config import Config, override

RUN = published.PRETRAINING | {
  "data.batch_size": 15360,
  "loss.balance_scope": "sequence",
  "loss.load_balance": 0.0001,
  "model.moe.dispatch": "grouped",
  "model.moe.exchange": "ragged",
  "model.moe.exchange_factor": 2.0,
  "optimizer.learning_rate": 2.2e-4,
  "optimizer.warmup_steps": 2000,
  "train.steps": 500000,
}
LAYOUTS: dict[str, dict[str, Any]] = {
  "v5p_1024": {
    "mesh.fsdp": 8,
    "mesh.expert": 64,
    "train.accumulation": 30,
  },
  "v5p_512": {
    "mesh.fsdp": 32,
    "mesh.expert": 8,
    "model.moe.dispatch": "gather",
    "model.moe.capacity_factor": 1.25,
    "model.moe.exchange": "auto",
    "model.moe.exchange_factor": 0.0,
    "train.accumulation": 60,
  },
}


def get_config(where: str = "v5p_1024") -> Config:
  config = override(published.get_config("deepseek_v3"), RUN)
  return published.on_devices(config, LAYOUTS, where)
