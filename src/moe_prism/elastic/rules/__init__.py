"""Selection rules: which candidate slots are kept."""

from ...catalogue import methods
from ...registry import View
from ..base import Rule

rules: View[type[Rule]] = methods.only("slots", "rule")
