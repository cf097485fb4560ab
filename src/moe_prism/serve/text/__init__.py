"""What is done with a client's text before it reaches the engine: chat templates, tokens, grammars."""
