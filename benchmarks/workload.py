"""The sizes of the models in the `train` and `decode` benchmarks, ours and the peers'."""

W = dict(
  vocab_size=256,
  dim=256,
  layers=4,
  heads=8,
  kv_heads=4,
  experts_count=8,
  top_k=2,
  expert_dim=512,
  seq_len=256,
  batch_size=16,
  seed=0,
)

LARGE = W | dict(vocab_size=8192, dim=512, layers=6, expert_dim=1024, seq_len=512, batch_size=4)


def cpus(text: str) -> list[int]:
  """Parses a list of CPUs, as in 0,1."""
  return [int(number) for number in text.split(",")]
