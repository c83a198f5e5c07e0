"""Kernels for CPUs, in C: what takes torch many passes over a few rows, in one."""
