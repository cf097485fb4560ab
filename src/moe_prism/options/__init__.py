"""What every command can be asked for, declared once: flags, `--help`, the check and the recorded JSON come from these classes.

The modules here hold data only. They load neither torch nor numpy, so that `moe-prism --help` does not wait for them.
"""

from .base import Options, flag_of, nested, option

__all__ = ["Options", "flag_of", "nested", "option"]
