"""Load on a server and what came of it: an open-loop generator, the metrics, and policies compared on the same arrivals.

Talks to any server with OpenAI's `/v1/completions`; needs no package that the library does not need.
"""
