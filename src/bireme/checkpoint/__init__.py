"""Checkpoints and artifacts: read, shard, load, prove, export."""
