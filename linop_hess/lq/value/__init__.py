"""Representations of what follows a state (cost-to-go) and of what precedes it (cost-to-come)."""
