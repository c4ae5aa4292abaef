"""Tests on emulated ARM boards."""
