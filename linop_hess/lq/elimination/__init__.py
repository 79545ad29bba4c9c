"""Pieces of elimination that methods share."""
