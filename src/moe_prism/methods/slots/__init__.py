"""Sub-experts: rules that keep some of a token's slots."""
