"""Processes that each hold some of the samples: sums over them, agreement on what is summed, errors that reach all."""

from linop_hess.processes.group import ALONE, Processes

__all__ = ["ALONE", "Processes"]
