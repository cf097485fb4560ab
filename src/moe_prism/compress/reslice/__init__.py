"""Sub-experts as experts of their own: an ordinary checkpoint of the same family with N times as many, each 1/N as wide."""
