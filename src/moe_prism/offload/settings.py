"""Fitted settings of a store in a file: who leaves, how many slots a layer has, what is read ahead. Untrusted when read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import CorruptError, UsageError
from ..files import read_bounded, replace_file
from ..schema import JsonBounds, read_form
from ..schema.expert_settings import AGAIN, ExpertSettingsForm, PredictorForm
from .base import CachePolicy
from .cache import cache_policies
from .keys import KeySpace
from .predict import Predictor, predictors
from .trace import Array

MOST_BYTES = 1 << 30  # of a predictor's arrays
DECIDING = "deciding_measured_on_this_processor"
"""In `ExpertSettings.made`: what policy and predictor take themselves, in milliseconds of a token, and the processor where that holds."""
BOUNDS = JsonBounds(bytes=256 << 20)


@dataclass(frozen=True)
class ExpertSettings:
    """space, slots: the keys it was fitted for, and how many fitted; quotas: slots per layer, None = equal parts.

    policy, settings: who leaves; predictor, width, arrays: what is read ahead, None and 0 = nothing; made: how it came about; shares: T1
    and T2 of what is missing (`store.choose_misses.Misses`), None = all of it is read as it is; prompt_rate: of the same, in prompts;
    expert_bits: of every layer the bits of each expert, for records of planes.
    """

    space: KeySpace
    slots: int
    policy: str
    settings: dict[str, Any] = field(default_factory=dict)
    quotas: tuple[int, ...] | None = None
    predictor: str | None = None
    width: int = 0
    arrays: dict[str, Array] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    shares: tuple[float, float] | None = None
    prompt_rate: float = 0.0
    expert_bits: tuple[tuple[int, ...], ...] | None = None


def write_settings(path: Path, settings: ExpertSettings) -> None:
    """The file, and one beside it where the predictor has arrays, which is written first."""
    predictor = None
    if settings.predictor is not None:
        predictor = PredictorForm(name=settings.predictor, width=settings.width)
        if settings.arrays:
            data = save({name: np.ascontiguousarray(array) for name, array in settings.arrays.items()})
            beside = path.with_suffix(".safetensors")
            replace_file(beside, data)
            predictor = predictor.model_copy(update={"file": beside.name, "sha256": sha256(data).hexdigest()})
    space = settings.space
    values = {
        "schema": 1,
        "kind": "expert settings",
        "layers": space.layers,
        "experts": space.experts,
        "parts": space.parts,
        "slots": settings.slots,
        "policy": settings.policy,
        "settings": settings.settings,
        "quotas": None if settings.quotas is None else list(settings.quotas),
        "predictor": predictor,
        "miss_shares": None if settings.shares is None else list(settings.shares),
        "prompt_rate": settings.prompt_rate,
        "expert_bits": None if settings.expert_bits is None else [list(own) for own in settings.expert_bits],
        "made": settings.made,
    }
    form = ExpertSettingsForm.model_validate(values)
    replace_file(path, (form.model_dump_json(by_alias=True, indent=1) + "\n").encode())


def read_settings(path: Path) -> ExpertSettings:
    """What a file holds, its form checked. UsageError where there is none, CorruptError for one that is damaged."""
    if not path.is_file():
        raise UsageError(f"settings '{path}' do not exist", "fit them: moe-prism offload fit TRACE -o settings.json")
    form = read_form(ExpertSettingsForm, path, AGAIN, BOUNDS)
    found, arrays = form.predictor, {}
    if found is not None and found.file is not None:
        arrays = _arrays(path.parent / found.file, found.sha256)
    if form.quotas is not None and len(form.quotas) != form.layers:
        raise CorruptError(f"{path}: {len(form.quotas)} quotas for {form.layers} layers", AGAIN)
    if form.expert_bits is not None and [len(own) for own in form.expert_bits] != [form.experts] * form.layers:
        raise CorruptError(f"{path}: bits of experts that are not {form.layers} layers of {form.experts}", AGAIN)
    shares = None if form.miss_shares is None else (form.miss_shares[0], form.miss_shares[1])
    if shares is not None and shares[0] > shares[1]:
        raise CorruptError(f"{path}: the miss shares {shares[0]:g} and {shares[1]:g} descend", AGAIN)
    return ExpertSettings(
        KeySpace(form.layers, form.experts, form.parts),
        form.slots,
        form.policy,
        form.settings,
        None if form.quotas is None else tuple(form.quotas),
        None if found is None else found.name,
        0 if found is None else found.width,
        arrays,
        form.made,
        shares,
        form.prompt_rate,
        None if form.expert_bits is None else tuple(map(tuple, form.expert_bits)),
    )


def _arrays(path: Path, digest: str | None) -> dict[str, Array]:
    try:
        data = read_bounded(path, MOST_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", AGAIN) from error
    if sha256(data).hexdigest() != digest:
        raise CorruptError(f"'{path}' is not the file that the settings name", AGAIN)
    try:
        return dict(load(data))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"'{path}' is no safetensors file of plain numbers", AGAIN) from error


def policy_of(settings: ExpertSettings, space: KeySpace) -> tuple[type[CachePolicy], dict[str, Any]]:
    """(policy, its settings) for a store with these keys. UsageError for other keys, CorruptError for settings that it does not take."""
    _check_space(settings, space)
    policy = cache_policies.get(settings.policy)
    if space.planes > 1 and (len(settings.space),) in policy.shapes(settings.space).values():
        raise UsageError(
            f"what '{settings.policy}' has fitted is of whole records, and these are planes", "fit with another --policy"
        )
    return policy, checked_settings(policy, settings.policy, settings.settings, space)


def checked_settings(policy: type[CachePolicy], name: str, settings: Mapping[str, Any], space: KeySpace) -> dict[str, Any]:
    """Settings of a policy, each a finite number or numbers of its shape."""
    shapes = policy.shapes(space)
    for key, value in settings.items():
        if key not in shapes:
            raise CorruptError(f"the policy '{name}' has no fitted setting '{key[:60]}'", AGAIN)
        try:
            array = np.array(value, np.float64)
        except (TypeError, ValueError):
            array = np.array([np.nan])
        if array.shape != shapes[key] or not np.isfinite(array).all() or _holds_text(value):
            raise CorruptError(f"'{key}' of the policy '{name}' is not numbers of shape {list(shapes[key])}", AGAIN)
    if policy.needs_fit and set(settings) != set(shapes):
        raise CorruptError(f"the policy '{name}' has {len(settings)} of its {len(shapes)} settings", AGAIN)
    return dict(settings)


def _holds_text(value: object) -> bool:
    """Whether a setting holds text or truth values, which numpy would read as numbers."""
    if isinstance(value, list):
        return any(map(_holds_text, value))
    return isinstance(value, str | bool) or value is None


def predictor_of(settings: ExpertSettings, space: KeySpace, hidden: int) -> Predictor | None:
    """The fitted predictor for a store with these keys and this hidden size; None where it needs no arrays."""
    _check_space(settings, space)
    if settings.predictor is None:
        return None
    kind = predictors.get(settings.predictor)
    return kind.from_arrays(settings.arrays, space, hidden) if kind.needs_fit else None


def _check_space(settings: ExpertSettings, space: KeySpace) -> None:
    """Planes of a sub-expert count as one key: what is fitted says nothing of single keys then."""
    whole = KeySpace(space.layers, space.experts, space.parts // space.planes)
    if settings.space != whole:
        own, given = (f"{s.layers} layers of {s.experts} experts in {s.parts} parts" for s in (settings.space, whole))
        raise UsageError(f"the settings are for {own}, this store has {given}", "fit them on a trace of this model, with --parts")
