"""What may stand in a file: every form that is read from a folder, closed and bounded, in one place.

Below everything that reads files: journals, points and prices are read by packages that know nothing of an artefact.
"""

from .common import Form, is_file_name, is_inner_name
from .read import JsonBounds, check, decode, read_form, read_json

__all__ = ["Form", "JsonBounds", "check", "decode", "is_file_name", "is_inner_name", "read_form", "read_json"]
