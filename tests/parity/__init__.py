"""Parity: our error against fp64 beside eager PyTorch's own error in the same dtype. What ``m3kernels check`` runs."""
