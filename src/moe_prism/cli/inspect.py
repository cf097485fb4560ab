"""`moe-prism inspect`"""

from __future__ import annotations

from .output import emit, table


def inspect(model: str, /, *, json: bool = False) -> None:
    """Show the MoE layers of a model, its bytes, and how its experts can be split. Reads headers, not weights.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a .gguf file, or 'nano'.
    json: One JSON object on stdout.
    """
    from ..api import inspect_model

    facts = inspect_model(model)
    share = facts["expert_parameters"] / facts["parameters"]
    head = (
        f"{facts['model']}: {facts['architecture']} ({facts['family']}), {facts['parameters'] / 1e6:.2f} M parameters, "
        f"{share:.0%} in experts, {facts['dtype']}, {facts['bytes_on_disk'] / 2**20:.1f} MiB on disk\n"
        f"experts per token: {facts['experts_per_token'] or 'unknown'}; --n-sub can be {facts['sub_experts']}\n"
    )
    columns = ("name", "kind", "experts", "hidden", "width", "gated", "biases")
    emit(facts, head + table(columns, [[row[c] for c in columns] for row in facts["layers"]]), json)
