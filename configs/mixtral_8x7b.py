"""Mixtral 8x7B (2401.04088): 32 layers, d 4096, 8 experts of 14336, top-2, 32 heads on 8.

Question   What does the published model cost, and how fast is a step on 64 accelerators? The shapes
           are those of Mixtral's published weights. Its paper says nothing of its training; here
           an expert has slots for 1.25 times the balanced load, and the balance loss is Switch's.
Command    python train.py --config=configs/mixtral_8x7b.py --describe
           python -m moe_jax.compile --config=configs/mixtral_8x7b.py --topology=v5p-128
           python -m moe_jax.compile --config=configs/mixtral_8x7b.py:h200_64 --topology=h200-64
Hardware   for --describe any; 64 accelerators (fsdp 8 x expert 8), on each of which the compiler
           reserves, v5p_128: 29.7 of 95 GiB; h200_64: 28.1 of 131.3 GiB
Time       --describe: seconds. To compile on 2 CPU cores: v5p_128 517 s; h200_64 181 s.
           Predicted, not measured, of a step of 1.05M tokens: v5p_128 5.29 s, MFU at most 53.7%,
           bound by the compiler's estimate of the experts (with half the batch and remat=dots
           2.34 s and 60.8%, in 64.2 GiB); h200_64 2.10 s, 62.8%, by compute
Expect     46.7B parameters, 12.88B active per token; 79.7 GFLOPs per token at sequence 4096
"""

from typing import Any

from configs import published
from moe_jax.config import Config, override

RUN = published.PRETRAINING | {
  "data.tokenizer": "tokenizer.model",
  "data.batch_size": 256,
  "loss.load_balance": 0.01,
  "loss.router_z": 1e-3,
  "model.moe.capacity_factor": 1.25,
  "optimizer.learning_rate": 3e-4,
  "optimizer.warmup_steps": 2000,
  "train.steps": 100_000,
}
LAYOUTS: dict[str, dict[str, Any]] = {
  "v5p_128": {
    "mesh.fsdp": 8,
    "mesh.expert": 8,
  },
  "h200_64": {
    "mesh.fsdp": 8,
    "mesh.expert": 8,
  },
}


def get_config(where: str = "v5p_128") -> Config:
  config = override(published.get_config("mixtral_8x7b"), RUN)
  return published.on_devices(config, LAYOUTS, where)
