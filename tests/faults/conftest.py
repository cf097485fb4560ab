from tests.serve.conftest import house, nothing_leaks, tiny_levels  # noqa: F401 - fixtures
