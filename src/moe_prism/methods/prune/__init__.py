"""Expert pruning: weight changes that leave fewer experts in memory."""
