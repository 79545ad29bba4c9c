"""What a solve is made of beside factors: its right-hand sides, its certificate, its solution."""
