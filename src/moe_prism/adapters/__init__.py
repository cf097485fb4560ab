"""Fine-tunes of a few experts that share a base model: their files, which experts they change, and where those are in memory."""
