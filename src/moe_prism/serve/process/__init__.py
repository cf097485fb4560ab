"""The engine in a process of its own, and what the two processes say to each other."""
