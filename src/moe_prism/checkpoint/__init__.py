"""Checkpoints on disk: checked reading, one layer at a time in memory, and output that is complete or absent."""

from .atomic import OutputFolder, sha256_file
from .dequantized import DequantizedSource, open_source
from .header import TensorInfo, read_header
from .journal import Journal
from .load import load_to_run, read_generation_config
from .manifest import Check, elastic_manifest, read_manifest, source_facts, update_manifest, verify, versions, write_manifest
from .rewrite import copy_companions, rewrite_gguf, rewrite_shards, save_model
from .shards import Source, check_finite, first_non_finite
from .stream import LayerStream

__all__ = [
    "Check",
    "DequantizedSource",
    "Journal",
    "LayerStream",
    "OutputFolder",
    "Source",
    "TensorInfo",
    "check_finite",
    "copy_companions",
    "elastic_manifest",
    "first_non_finite",
    "load_to_run",
    "open_source",
    "read_generation_config",
    "read_header",
    "read_manifest",
    "rewrite_gguf",
    "rewrite_shards",
    "save_model",
    "sha256_file",
    "source_facts",
    "update_manifest",
    "verify",
    "versions",
    "write_manifest",
]
