"""From hidden states to losses and gradients, without logits of all rows: chunks, their matmuls, operators."""
