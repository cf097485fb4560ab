"""Text to token windows, with calibration and evaluation text disjoint by construction."""

from .splits import bucket_of, split_documents
from .text import Document, read_documents
from .windows import Windows, token_windows

__all__ = ["Document", "Windows", "bucket_of", "read_documents", "split_documents", "token_windows"]
