"""F13: files of an operator that are huge, hollow or of another kind."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_prism.errors import UsageError
from moe_prism.schedule.classes import load_classes
from moe_prism.schema.yaml import LARGEST, read_yaml
from moe_prism.serve.config import load_config

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
LETTERS = st.text(st.characters(codec="utf-8") | st.sampled_from("{}[]:-&*!|>%@`\n \"'#?,0123456789abn~="), max_size=60)
CASES = {
    "bomb": (BOMB, r"aliases \(\*a0\) are not taken"),
    "merge": ("a: &a {b: 1}\nc:\n  <<: *a\n", "aliases"),
    "deep": ("[" * 20_000, "nested too deeply|not YAML"),
    "no date": ("a: 2020-99-99\n", "not YAML"),
    "tag": ("a: !!python/object/apply:os.system [x]\n", "not YAML"),
    "huge": ("x" * (LARGEST + 1), "at most"),
    "two": ("a: 1\n---\nb: 2\n", "not YAML"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("read", [load_classes, load_config])
def test_f13_what_is_no_plain_yaml_is_one_line(tmp_path, case, read):
    text, says = CASES[case]
    (tmp_path / "qos.yaml").write_text(text)
    tracemalloc.start()
    with pytest.raises(UsageError, match=says) as caught:
        read(tmp_path / "qos.yaml")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and peak < 20_000_000


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LETTERS | st.binary(max_size=40))
def test_f13_any_bytes_are_a_value_or_one_line(tmp_path, data):
    path = tmp_path / "qos.yaml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    for read in (read_yaml, load_classes, load_config):
        try:
            read(path)
        except UsageError as error:
            assert "\n" not in str(error)
