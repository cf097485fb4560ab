"""`python -m moe_prism`: the `moe-prism` command where the console script is not on the path."""

from .cli import entry

if __name__ == "__main__":
    entry()
