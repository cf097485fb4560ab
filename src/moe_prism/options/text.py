"""How the text of a command is named."""

SOURCES = (
    "stdlib, topics, domains (or one of domains/python, domains/prose, domains/headers, domains/web), "
    "a file, a folder, a .jsonl file or a saved dataset"
)
