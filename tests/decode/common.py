"""Prompts, and continuations at a decoding method."""

from dataclasses import replace

from moe_prism.jobs.generate import generate
from moe_prism.options.generate import GenerateOptions
from moe_prism.point import FULL, Decoding

PROMPTS = ("import os\nimport sys\n\ndef main(", "class Foo:\n    def __init__(self, a, b):\n", "for i in range(10):\n", "x =")


def decoded(method, point=FULL, **settings):
    return replace(point, decoding=Decoding(method=method, settings=settings))


def texts(opened, point, **sampling):
    """Answers to all prompts, and what the method says of each."""
    model, tokenizer = opened
    made = [
        generate(model, tokenizer, p, point=point, sampling=GenerateOptions(**{"max_tokens": 24, **sampling})) for p in PROMPTS
    ]
    return [one.text for one in made], [one.decoding for one in made]
