"""The words that a field can have, each with its meaning. Imports no jax."""

from moe_jax.config.fields import Choice


class Router(Choice):
  """How tokens and experts find each other. docs/routing.md compares the routers."""

  SWITCH = "switch"
  TOPK = "topk"
  NOISY_TOPK = "noisy_topk"
  EXPERT_CHOICE = "expert_choice"
  SINKHORN = "sinkhorn"
  HASH = "hash"
  RANDOM = "random"


class QKNorm(Choice):
  """The RMSNorm of queries and keys before positions are added."""

  NONE = "none", "none"
  HEAD = "head", "of each head by itself, with one scale for all heads (Qwen3)"
  WIDTH = "width", "over all heads together, with a scale for each (OLMoE)"


class GroupScore(Choice):
  """What the groups of experts are compared by."""

  TWO_BEST = "two_best", "the sum of a group's two best scores (DeepSeek-V3)"
  BEST = "best", "a group's best score (DeepSeek-V2)"


class Activation(Choice):
  """The nonlinearity of a feed-forward and of an expert, between its matrices."""

  SWIGLU = "swiglu", "silu(gate) * up (2002.05202)"
  CLAMPED_SWIGLU = (
    "clamped_swiglu",
    "(up + 1) * gate * sigmoid(1.702 gate), both clamped by activation_limit (gpt-oss)",
  )
  GEGLU = "geglu", "gelu(gate) * up, with tanh (2002.05202)"
  RELU_SQUARED = "relu_squared", "max(up, 0)^2, without a gate matrix (2109.08668)"
  GELU = "gelu", "gelu(up), with tanh, without a gate matrix"


class RopeKind(Choice):
  """How the rotary embedding's wavelengths are stretched for text longer than `original_length`."""

  NONE = "none", "not at all"
  LINEAR = "linear", "all alike, by `factor` (2306.15595)"
  YARN = "yarn", "the long ones by `factor`, with a ramp from beta_fast to beta_slow (2309.00071)"
  LLAMA3 = "llama3", "the long ones by `factor`, with a ramp over wavelengths (2407.21783)"


class Score(Choice):
  """What a token's logits are made into."""

  SOFTMAX = "softmax", "probabilities: a token's scores sum to 1"
  SIGMOID = "sigmoid", "each expert is scored alone (DeepSeek-V3)"


class Priority(Choice):
  """Whose assignments find a slot first when an expert is full."""

  TOKEN = "token", "by position: causal"
  CHOICE = "choice", "all first choices, then all second ones (GShard); not causal"
  SCORE = "score", "by choice, then the most confident tokens (V-MoE); not causal"


class Dispatch(Choice):
  """How tokens are laid out in rows for the experts."""

  GATHER = "gather", "moved by index into a fixed number of slots per expert; what overflows drops"
  EINSUM = "einsum", "the same result by matmuls with one-hot matrices (GShard)"
  GROUPED = "grouped", "sorted by expert, for one grouped matmul; never drops"
  DENSE = "dense", "every expert computes every token: the oracle of the tests; never drops"


class Exchange(Choice):
  """How the grouped dispatch moves tokens over the `expert` axis of the mesh."""

  AUTO = "auto", "`ragged` on TPU, `all_gather` elsewhere"
  ALL_TO_ALL = "all_to_all", "fixed buffers of `exchange_factor`; what overflows is counted"
  ALL_GATHER = "all_gather", "every device sees every token; outputs return by a reduce-scatter"
  RAGGED = "ragged", "a ragged_all_to_all moves only what is routed; not on CPU"


class ExchangeFallback(Choice):
  """What becomes of rows that a buffer of the exchange has no room for."""

  NONE = "none", "they are lost and counted"
  EXACT = "exact", "the layer is computed again in as many chunks as need no larger buffers"


class GroupedMatmul(Choice):
  """The kernel of the grouped dispatch's experts; kernels/experts.py has a record for each."""

  AUTO = "auto", "the fastest here that gives the reference's answer, chosen when a run starts"
  RAGGED_DOT = "ragged_dot", "XLA's own: the reference"
  BLOCKED = "blocked", "a loop of plain matmuls: for CPUs"
  MOSAIC = "mosaic", "tokamax, for GPU and TPU"
  MOSAIC_TPU_V2 = "mosaic_tpu_v2", "tokamax, for TPU"
  TRITON = "triton", "tokamax, for GPU"


class Attention(Choice):
  """The kernel of attention over segments; kernels/attention.py has a record for each."""

  AUTO = "auto", "the platform's, chosen when a run starts"
  REFERENCE = "reference", "a few lines, for every platform and size"
  BLOCKS = "blocks", "blocks of queries: for CPUs"
  CUDNN = "cudnn", "cuDNN's flash attention: for NVIDIA"
  SPLASH = "splash", "Pallas splash attention: for TPU"


class BalanceScope(Choice):
  """The tokens over which the balance loss takes its two means."""

  SEQUENCE = "sequence", "each row alone (DeepSeek-V3)"
  MICROBATCH = "microbatch", "one accumulation step, on all devices"
  GLOBAL = "global", "the whole batch (2501.11873)"


class OnAlarm(Choice):
  """What an alarm does."""

  OFF = "off", "nothing"
  WARN = "warn", "it writes a line on the terminal and in alarms.jsonl"
  STOP = "stop", "the same, and the run ends; its newest checkpoint stands"


class OnNonfinite(Choice):
  """What happens after a step whose loss, gradients or router logits are not finite."""

  OFF = "off", "nothing; but a state that is not finite is never saved"
  WARN = "warn", "the same, and a line on the terminal and in alarms.jsonl"
  STOP = "stop", "the run ends; its newest checkpoint stands"
  SKIP = "skip", "the step's update is dropped; `skip_limit` of them in a row end the run"
  REWIND = "rewind", "back to the newest checkpoint and on with later rows, `rewind_limit` times"


class Remat(Choice):
  """Which activations of the forward pass are kept for the backward pass."""

  NONE = "none", "all"
  DOTS = "dots", "the outputs of matmuls; the rest is computed again"
  FULL = "full", "one for each layer; the rest is computed again"
  OFFLOAD = "offload", "as full, and that one in the host's memory"


class GradientSums(Choice):
  """The type in which devices add up the gradients of matrices that the mesh splits."""

  COMPUTE = "compute", "that of activations"
  FLOAT32 = "float32", "twice the bytes of bfloat16, and rounded once"


class Dtype(Choice):
  """A type of floating-point numbers."""

  FLOAT32 = "float32"
  BFLOAT16 = "bfloat16"


class Schedule(Choice):
  """The learning rate after the warm-up."""

  COSINE = "cosine", "falls along a cosine to final_fraction of the peak"
  WSD = "wsd", "stays, then falls linearly over the last decay_fraction of the steps"
  CONSTANT = "constant", "stays"


class OptimizerName(Choice):
  """The update rule. docs/guide.md compares the optimizers; optimizers.py has a record for each."""

  ADAMW = "adamw"
  ADAFACTOR = "adafactor"
  MUON = "muon"
