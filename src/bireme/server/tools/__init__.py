"""Tool calls in a model's text: how each style writes them, read while they stream."""
