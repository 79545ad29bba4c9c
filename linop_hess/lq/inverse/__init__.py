"""What a factorization can be asked, a question a file."""
