"""A pool of models behind one OpenAI endpoint: each request goes to a model and a quality level that meet its limits."""
