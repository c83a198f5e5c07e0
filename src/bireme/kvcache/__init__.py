"""Paged KV cache: its bookkeeping (plain Python) and its tensors."""
