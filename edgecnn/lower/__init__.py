"""Rewrites that make a graph fast on a runtime without changing what it computes."""
