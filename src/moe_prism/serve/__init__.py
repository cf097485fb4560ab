"""An OpenAI-compatible server over transformers' continuous batching, whose scheduling policy also chooses the operating point.

Needs `pip install 'moe-prism[serve]'`. `engine` runs the model in a thread, `app` speaks HTTP, everything between is plain data.
"""
