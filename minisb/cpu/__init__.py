"""Cython twins of minisb/ops: the same names, compiled, on several threads."""
