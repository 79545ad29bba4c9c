"""Kinds of stage of a linear-quadratic problem, a kind a file: its products and its row space."""
