"""Text to token windows, with calibration and evaluation text disjoint by construction."""

from .buckets import bucket_of
from .document import Document
from .splits import split_documents
from .text import read_documents
from .windows import Windows, token_windows

__all__ = ["Document", "Windows", "bucket_of", "read_documents", "split_documents", "token_windows"]
