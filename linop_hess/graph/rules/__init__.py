"""Families of layers and their derivatives, a family a file."""
