"""Checkpoints on disk: checked reading, one layer at a time in memory, and output that is complete or absent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_use
from .atomic import OutputFolder, sha256_file
from .change import changing, put_file, update_manifest
from .companions import companion_facts, copy_companions
from .finished import Check, elastic_manifest, read_manifest, verify
from .header import TensorInfo, read_header
from .journal import Journal
from .links import follow_links
from .manifest import check_listed, source_facts, write_manifest
from .shards import Source
from .versions import versions

if TYPE_CHECKING:
    from .dequantized import DequantizedSource, open_source
    from .stream import LayerStream
    from .tensors import check_finite, first_non_finite
    from .whole import open_whole

__getattr__ = on_use(  # these need torch and transformers, the others look at files
    __name__,
    {
        "dequantized": "DequantizedSource open_source",
        "stream": "LayerStream",
        "tensors": "check_finite first_non_finite",
        "whole": "open_whole",
    },
)

__all__ = [
    "Check",
    "DequantizedSource",
    "Journal",
    "LayerStream",
    "OutputFolder",
    "Source",
    "TensorInfo",
    "changing",
    "check_finite",
    "check_listed",
    "companion_facts",
    "copy_companions",
    "elastic_manifest",
    "first_non_finite",
    "follow_links",
    "open_source",
    "open_whole",
    "put_file",
    "read_header",
    "read_manifest",
    "sha256_file",
    "source_facts",
    "update_manifest",
    "verify",
    "versions",
    "write_manifest",
]
