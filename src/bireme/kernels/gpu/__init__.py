"""Triton kernels. Imported only where `bireme.kernels.choice` says that they run."""
