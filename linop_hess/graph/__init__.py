"""How a torch model becomes a chain of stages with first and second derivatives."""
