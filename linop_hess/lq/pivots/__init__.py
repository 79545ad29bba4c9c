"""One symmetric block: its factorization, the signs of its pivots, which of them may be divided by."""
