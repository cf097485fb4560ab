"""One set of weights for several experts."""
