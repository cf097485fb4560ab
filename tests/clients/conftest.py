from tests.serve.conftest import chat_house, house, nothing_leaks, tiny_chat, tiny_levels  # noqa: F401 - fixtures
