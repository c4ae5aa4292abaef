"""A doctor's letter before a network becomes int8: static checks, seconds instead of a compression.

`letter.diagnose` asks every check; each returns Findings with the layers, why it matters and what to do.
"""
