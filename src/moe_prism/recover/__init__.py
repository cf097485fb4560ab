"""Win back quality below full budget from calibration text, in tensors beside the weights."""
