"""H as a dense matrix, from the structure of its stages."""
