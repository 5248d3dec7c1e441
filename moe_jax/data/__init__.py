"""Text data: TFDS documents, tokenizers, packed rows, and a Grain iterator over batches."""
