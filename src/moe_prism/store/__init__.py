"""Real weights behind a cache: a packed file of sub-experts, an arena in memory, asynchronous reads."""

from ..memory import parse_bytes
from .load import StoreOptions, load_stored
from .pack import Pack, open_pack, write_pack
from .reader import RecordReader, StoreError
from .store import ExpertStore

__all__ = [
    "ExpertStore",
    "Pack",
    "RecordReader",
    "StoreError",
    "StoreOptions",
    "load_stored",
    "open_pack",
    "parse_bytes",
    "write_pack",
]
