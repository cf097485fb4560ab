"""Option classes: words for every flag, ranges and names checked in one line, and every flag in the field it is declared for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import cyclopts
import pytest

from moe_prism.cli.flags import with_flags
from moe_prism.errors import UsageError
from moe_prism.options import Options, nested, option
from moe_prism.options.bench import CompareOptions, Offer, SingleOptions
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.prune import PruneOptions
from moe_prism.options.recover import RecoverOptions
from moe_prism.options.refactor import RefactorOptions
from moe_prism.options.speed import SpeedOptions
from moe_prism.options.trace import TraceOptions

EVERY = (
    RefactorOptions, CalibrateOptions, PruneOptions, RecoverOptions, TraceOptions, SpeedOptions, Offer, SingleOptions, CompareOptions
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Inner(Options):
    text: str = option("stdlib", "Text.")
    seed: int = option(0, "Seed of the inner.", least=0)
    hidden: int = option(7, "No flag of the outer.")


@dataclass(frozen=True, kw_only=True)
class Outer(Options):
    count: int = option(4, "Count.", least=2)
    share: float = option(0.5, "Share.", above=0, most=1)
    rates: tuple[float, ...] = option((), "Rates.", flag="rate", empty="auto", above=0)
    names: list[str] = option(["alt"], "Names.", names="moe_prism.partition:solvers", also=("none",))
    speed: float | None = option(None, "Speed.", unit=("B/s",))
    seed: int = option(0, "Seed.")
    options: str = option("a", "A flag with the name of the command's parameter.")
    inner: Inner = nested(Inner, "text", "seed")


def parsed(*tokens: str) -> Outer:
    found: list[Outer] = []

    def command(name: str, /, *, options: Outer, json: bool = False) -> None:
        """Do it.

        Parameters
        ----------
        name
            Whose.
        json
            As JSON.
        text
            Words of the command.
        """
        assert (name, json) == ("x", True)
        found.append(options)

    app = cyclopts.App(result_action="return_value")
    app.default(with_flags(command))
    app(["x", "--json", *tokens], exit_on_error=False, print_error=False)
    (words,) = [a.parameter.help for a in app.assemble_argument_collection() if a.name == "--text"]
    assert words == "Words of the command."
    return found[0]


@pytest.mark.parametrize("kind", EVERY)
def test_every_class_is_described_frozen_and_keyword_only(kind):
    made = kind()
    made.check()
    assert all("flags" in f.metadata or f.metadata["help"].endswith(".") for f in fields(kind))
    with pytest.raises(TypeError):
        kind(1)
    with pytest.raises(AttributeError):
        made.seed = 1
    assert kind() == made and all(f.kw_only for f in fields(kind))


def test_flags_fill_the_fields_they_are_declared_for():
    assert parsed() == Outer()
    made = parsed(
        "--count",
        "3",
        "--rate",
        "1,2.5",
        "--names",
        "sa,none",
        "--speed",
        "3GB/s",
        "--seed",
        "5",
        "--text",
        "t",
        "--options",
        "b",
    )
    inner = {"text": "t", "seed": 5, "hidden": 7}  # one flag, two seeds
    expected = {
        "count": 3,
        "share": 0.5,
        "rates": (1.0, 2.5),
        "names": ["sa", "none"],
        "speed": 3e9,
        "seed": 5,
        "options": "b",
        "inner": inner,
    }
    assert asdict(made) == expected
    assert parsed("--rate", "auto").rates == () and parsed("--names", "").names == []
    with pytest.raises(cyclopts.CycloptsError):
        parsed("--hidden", "1")


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"count": 1}, "--count 1 is too small; give at least 2"),
        ({"share": 0.0}, "--share 0 is out of range; give more than 0 and at most 1"),
        ({"share": math.nan}, "--share nan is out of range"),
        ({"rates": (1.0, -2.0)}, "--rate -2 is out of range; give more than 0"),
        ({"rates": (math.inf,)}, "--rate inf"),
        ({"names": ["sa", "best"]}, "unknown solver 'best'; did you mean 'nested'? choose one of: none, alt, nested"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(wrong, line):
    with pytest.raises(UsageError) as refused:
        Outer(**wrong).check()
    assert line in f"{refused.value.cause}; {refused.value.next_step}"


@pytest.mark.parametrize(("flag", "text"), [("--rate", "1,many"), ("--speed", "3GFLOPS")])
def test_text_that_is_no_value(flag, text):
    with pytest.raises(UsageError, match=f"{flag} '{text}'"):
        parsed(flag, text)


def test_the_seed_of_pruning_is_not_that_of_its_calibration():
    """What `prune` writes into prism.json would change with it."""
    assert "seed" not in next(f for f in fields(PruneOptions) if f.name == "calibration").metadata["flags"]
