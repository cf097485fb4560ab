"""Methods that let several experts share one set of weights."""
