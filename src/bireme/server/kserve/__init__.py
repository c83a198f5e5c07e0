"""KServe's open inference protocol, version 2, with Triton's extensions for binary tensors and classes."""
