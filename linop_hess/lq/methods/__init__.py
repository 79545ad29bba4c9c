"""Methods that factor H + damping·I, a method a file."""
