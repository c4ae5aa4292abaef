"""What runs on the board: the standard library, NumPy and one inference runtime.

Nothing here may import the rest of edgecnn: this folder is shipped alone.
"""
