"""Routing that vLLM and SGLang tell in their answers becomes a trace; what is wrong is one line."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.cli import main
from moe_prism.errors import PrismError, UsageError
from moe_prism.jobs.fit_offload import fit_offload
from moe_prism.offload.answers import RoutedShape, read_answers
from moe_prism.offload.trace import DECODE, PREFILL, load_trace
from moe_prism.options.fit import FitOptions

SHAPE = RoutedShape(layers=3, moe=[1, 2], experts=8, k=2)


def routed(tokens, seed=0, shape=SHAPE, layers=None):
    draw = np.random.default_rng(seed)
    layers = shape.layers if layers is None else layers
    return np.stack([draw.permutation(shape.experts)[: shape.k] for _ in range(tokens * layers)]).reshape(tokens, layers, shape.k)


def vllm(ids, prompt):
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.int16))
    text = base64.b64encode(buffer.getvalue()).decode()
    return {"choices": [{"text": "x", "routed_experts": text}], "usage": {"prompt_tokens": prompt}}


def sglang(ids, prompt):
    text = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    return {
        "text": "x",
        "meta_info": {"prompt_tokens": prompt, "completion_tokens": len(ids) + 1 - prompt, "routed_experts": text},
    }


def written(tmp_path, *answers):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return path


@pytest.mark.parametrize("form", [vllm, sglang])
@pytest.mark.parametrize("layers", [3, 2])  # all of the model's, or the MoE layers alone
def test_both_forms_give_the_same_trace(form, layers, tmp_path):
    ids = [routed(9, seed, layers=layers) for seed in range(4)]
    trace = read_answers(written(tmp_path, *(form(own, 4) for own in ids)), SHAPE, "m")
    wanted = np.concatenate(ids)
    assert np.array_equal(trace.expert_ids, wanted if layers == 2 else wanted[:, [1, 2]])
    assert trace.request.tolist() == [r for r in range(4) for _ in range(9)]
    assert trace.phase.tolist() == ([PREFILL] * 4 + [DECODE] * 5) * 4
    assert trace.step.tolist() == [6 * r + max(0, p - 3) for r in range(4) for p in range(9)]
    assert trace.side.tolist() == [0] * 18 + [1] * 18 and set(trace.token.tolist()) == {-1}


def test_a_trace_of_answers_is_fitted(tmp_path, capsys):
    own = load_trace("nano")
    shape = RoutedShape(own.layers, range(own.layers), own.experts, own.k)
    answers = [vllm(routed(24, seed, shape), 4) for seed in range(6)]
    file, out = written(tmp_path, *answers), tmp_path / "trace.npz"
    assert main(["trace", "nano", "--answers", str(file), "-o", str(out)]) == 0
    asked = FitOptions(policy=["lru", "lfu"], predictor=["frequency", "token"], share=0.5)
    assert len(fit_offload(load_trace(out), None, asked).held_out) >= 3
    assert main(["trace", "nano", "--answers", str(file), "--budget", "0.5", "-o", str(tmp_path / "t")]) == 2
    assert "--answers takes everything" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"choices": [{"text": "x"}], "usage": {"prompt_tokens": 1}}, "no routed experts"),
        ({"choices": [{"routed_experts": "AAAA"}]}, "how many tokens"),
        ({"choices": [{"routed_experts": "!"}], "usage": {"prompt_tokens": 1}}, "no base64"),
        ([1], "no answer of a server"),
        (vllm(routed(4, layers=5), 1), "not those of 3 layers"),
        (vllm(routed(4) + 7, 1), "outside 0..7"),
        (sglang(routed(3)[:, :, :1], 1), "not those of 3 layers"),
        ({"choices": []}, "has routed experts"),
    ],
)
def test_what_is_no_routing_of_this_model_is_said_in_one_line(answer, reason, tmp_path):
    with pytest.raises(PrismError, match=reason) as caught:
        read_answers(written(tmp_path, answer), SHAPE, "m")
    assert "\n" not in str(caught.value)


def test_a_head_that_promises_more_than_there_is_allocates_nothing(tmp_path):
    buffer = io.BytesIO()
    head = {"shape": (10**13, 3, 2), "fortran_order": False, "descr": "<i2"}
    np.lib.format.write_array_header_1_0(buffer, head)
    data = buffer.getvalue() + bytes(24)
    answer = {"choices": [{"routed_experts": base64.b64encode(data).decode()}], "usage": {"prompt_tokens": 1}}
    with pytest.raises(PrismError, match="not the whole numbers"):
        read_answers(written(tmp_path, answer), SHAPE, "m")
    with pytest.raises(UsageError, match="cannot read"):
        read_answers(tmp_path / "none", SHAPE, "m")


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_or_a_trace(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a")
    answer = {"choices": [{"routed_experts": base64.b64encode(data).decode()}], "usage": {"prompt_tokens": 1}}
    try:
        read_answers(written(folder, answer), SHAPE, "m")
    except PrismError as error:
        assert "\n" not in str(error)
