"""One run of a model and a loss, recorded operation by operation."""
