"""Structured pruning: importance, allocation, surgery, and the pass that puts them together."""
