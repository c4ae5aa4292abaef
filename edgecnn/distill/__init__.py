"""Distillation: a student network learns from a teacher's outputs, and from its features where asked."""
