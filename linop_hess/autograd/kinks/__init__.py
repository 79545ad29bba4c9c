"""Kinks: where a run meets them, the smooth surrogates that may stand for their curvature, and the windows of maxima."""
