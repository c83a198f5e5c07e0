"""Pipelines of any `nn.Module` that classifies images: cut at its blocks, a stage a process."""
