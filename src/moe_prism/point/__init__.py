"""The operating point: how a model runs. Data, nothing else; what runs it is in `elastic`, what measures it in `frontier`."""

from .base import FULL, Decoding, OperatingPoint, RoutingStage, SlotRule, WeightChange
from .named import NamedPoint, find_point, name_within, read_points, write_point
from .slots import SlotBits, Toll

__all__ = [
    "FULL",
    "Decoding",
    "NamedPoint",
    "OperatingPoint",
    "RoutingStage",
    "SlotBits",
    "SlotRule",
    "Toll",
    "WeightChange",
    "find_point",
    "name_within",
    "read_points",
    "write_point",
]
