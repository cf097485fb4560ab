"""Make a model smaller before it is served. One method, one file."""
