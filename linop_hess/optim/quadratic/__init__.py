"""Quadratic models of a loss at one point, and the damped steps that are found with them."""
