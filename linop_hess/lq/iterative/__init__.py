"""What solves by iterating needs: directions, samples and spans of a sketch, how many iterations to expect, GMRES."""
