"""Machines that networks are compressed for and run on."""
