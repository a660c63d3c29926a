"""Peak memory of a fine-tuning step without a GPU: the real code on tensors that have no values."""
