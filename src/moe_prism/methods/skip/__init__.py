"""Expert skipping: routing stages that compute fewer of the router's experts."""
