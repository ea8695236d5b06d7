"""Kernels and programs compiled for GPUs that are not there."""
