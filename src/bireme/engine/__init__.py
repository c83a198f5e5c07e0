"""From scheduled batches to tokens, on one process a rank."""
