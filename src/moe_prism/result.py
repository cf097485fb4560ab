"""What every result of `moe_prism` can do: become JSON, rows for a data frame, and a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

SHOWN = 60
"""Rows of a table in a notebook; `to_frame` has them all."""


class Result:
    """Base of results. A result with one row per layer, point or way overrides `to_records`.

    >>> import moe_prism
    >>> facts = moe_prism.inspect_model("nano")
    >>> isinstance(facts, moe_prism.Result), len(facts.to_records()), sorted(facts.to_json())[:2]
    (True, 6, ['architecture', 'bytes_on_disk'])
    """

    def to_json(self) -> dict[str, Any]:
        """Everything that is known, as plain JSON values."""
        raise NotImplementedError(f"{type(self).__name__}.to_json")

    def to_records(self) -> list[dict[str, Any]]:
        """The rows of `to_frame`: by default one, of what is a single value."""
        return [{name: value for name, value in self.to_json().items() if not isinstance(value, dict | list | tuple)}]

    def to_frame(self) -> Any:
        """`to_records` as a pandas.DataFrame. UsageError where pandas is not installed."""
        from .errors import UsageError

        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError as error:
            raise UsageError("a data frame needs pandas", "pip install 'moe-prism[notebook]'") from error
        return pandas.DataFrame(self.to_records())

    def _repr_html_(self) -> str:
        """A table; what a file or a model is called stands in it as text, never as HTML."""
        rows = self.to_records()
        names = list(dict.fromkeys(name for row in rows for name in row))
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in names)}</tr>" for row in rows[:SHOWN])
        more = f"<p>and {len(rows) - SHOWN} more rows: see to_frame()</p>" if len(rows) > SHOWN else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


class Findings(dict[str, Any], Result):
    """A result that is a dictionary of plain JSON values. rows: the key of the list that makes its rows."""

    def __init__(self, values: Mapping[str, Any], rows: str | None = None) -> None:
        super().__init__(values)
        self._rows = rows

    def to_json(self) -> dict[str, Any]:
        return dict(self)

    def to_records(self) -> list[dict[str, Any]]:
        return super().to_records() if self._rows is None else [dict(row) for row in self[self._rows]]


def plain(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what is not a single value."""
    return [{name: value for name, value in row.items() if not isinstance(value, dict | list | tuple)} for row in rows]


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return f"<td>{escape(text)}</td>"
