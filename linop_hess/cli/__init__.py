"""The command ``linop-hess``."""
