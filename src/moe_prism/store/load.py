"""Load a model whose experts stay on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import LayerStream, changing
from ..checkpoint.manifest import check_layers
from ..elastic.runtime import experts_per_token
from ..errors import CorruptError, UsageError
from ..model import MoELayer, find_layers, read_generation_config
from ..offload.settings import ExpertSettings
from .aio_reader import open_reader
from .arena import slots_in
from .choose_misses import Misses
from .decisions import request_seconds
from .fitted import choose, measured_elsewhere
from .layer import StoredElastic, resident_bytes, stored_parts
from .pack import Pack, check_fits, open_pack, write_pack
from .plane_layer import PlaneElastic
from .plane_layout import PlaneLayout
from .plane_store import PlaneStore
from .pools import Eviction
from .reader import RecordReader
from .sizing import FirstSteps, cache_bytes, kept_free, memory_for_experts
from .store import ExpertStore
from .tiers import Tier, TieredStore

logger = logging.getLogger(__name__)
PACK_FILE = "experts.pack"


@dataclass(frozen=True)
class StoreOptions:
    """memory: bytes for experts and what predicts them, None: what is left beside a KV cache of `cache_tokens`; file: the packed file,
    default `experts.pack` in the model's folder; policy, settings: who is evicted, default `pools.policy_for`; parts: records per expert
    (1 = whole experts), default the model's sub-experts; misses: what is not read, or in int8 form; ahead: records to read ahead of a
    layer; tries_ahead: only where steps are shorter with it (`trial.AheadTrial`); predictor: of the experts that are read ahead; horizon:
    layers to look ahead (`read_ahead.Guess`); fitted: a file of `moe-prism offload fit`, which says what is not said here; reader: a
    test's own; tier: `memory` is fast memory, behind which host memory holds records too (`tiers.py`).
    """

    memory: int | None
    file: Path | None = None
    policy: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    parts: int | None = None
    misses: Misses = field(default_factory=Misses)
    ahead: int | None = None
    tries_ahead: bool = False
    predictor: str | None = None
    horizon: int = 1
    fitted: Path | None = None
    cache_tokens: int = 4096
    reader: Callable[[Pack, Tensor], RecordReader] = open_reader
    tier: Tier | None = None


def ready_pack(
    folder: Path, manifest: Mapping[str, Any], options: StoreOptions, progress: Callable[[int, int], None] | None = None
) -> Pack:
    """The packed file of an artefact, written first where there is none."""
    path, low = options.file or folder / PACK_FILE, options.misses.needs_low
    if options.parts not in (None, 1, manifest["n_sub"]):
        raise UsageError(
            f"an expert cannot lie in {options.parts} records", f"give 1, or {manifest['n_sub']}, the model's sub-experts"
        )
    if not path.exists():
        if path.parent.resolve() == folder.resolve():
            _pack_inside(folder, path.name, manifest, options, progress)
        else:
            write_pack(folder, path, manifest, parts=options.parts, low=low, progress=progress)
    pack = open_pack(path, manifest)
    wanted = (manifest["n_sub"] if options.parts is None else options.parts) * pack.layout.planes
    low = low and not isinstance(pack.layout, PlaneLayout)  # the upper plane is the smaller form
    if pack.space.parts != wanted or (low and not pack.has_low):
        what = f"{pack.space.parts} parts per expert instead of {wanted}" if pack.space.parts != wanted else "no int8 records"
        raise CorruptError(f"'{path}' has {what}", "remove it, or give another place with --expert-file")
    return pack


def _pack_inside(
    folder: Path, name: str, manifest: Mapping[str, Any], options: StoreOptions, progress: Callable[[int, int], None] | None
) -> None:
    """The packed file as a change of the folder: with its entry in prism.json, or not at all."""
    with changing(folder) as change:
        if (folder / name).exists():  # by somebody who was at it before us
            return
        low = options.misses.needs_low
        write_pack(folder, change.work / name, manifest, parts=options.parts, low=low, progress=progress)
        change.commit({"caches": sorted({*manifest.get("caches", ()), name})})


def _check_form(fitted: ExpertSettings, planes: bool, lossy: Misses) -> None:
    """UsageError for settings whose loss was measured on records of the other kind. lossy: what of them would be taken."""
    if planes and not lossy.is_exact():
        raise UsageError(
            "what these settings read in int8 form was not fitted for planes", "fit with --planes, or give --miss-shares 1,1"
        )
    if not planes and fitted.expert_bits is not None:
        raise UsageError(
            "these settings give experts bits of their own, and the records are no planes", "give --expert-file of planes"
        )


def _opened(pack: Pack, slots: int, like: MoELayer, eviction: Eviction, options: StoreOptions) -> ExpertStore:
    if options.tier is None:
        return ExpertStore(pack, slots, like, eviction, reader=options.reader)
    if options.misses.needs_low:
        raise UsageError("host memory behind fast memory holds no int8 forms", "leave the int8 budget and the prompt rate out")
    return TieredStore(pack, slots, like, eviction, tier=options.tier, reader=options.reader)


def load_stored(
    folder: Path,
    manifest: Mapping[str, Any],
    tensors: Sequence[dict[str, Tensor]],
    options: StoreOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """A model on the CPU in float32 whose experts were never in memory: elastic, at full budget. tensors: side tensors per layer.

    Raises DoesNotFit if the memory holds no sub-expert, CorruptError for a packed file that is damaged or of another model.
    """
    chosen = choose(options.policy, options.settings, options.ahead, options.predictor, options.fitted)  # before anything is read
    unsaid = options.misses == Misses()
    if chosen.fitted is not None and unsaid:
        options = replace(options, misses=Misses(shares=chosen.fitted.shares, prompt_rate=chosen.fitted.prompt_rate))
    pack = ready_pack(folder, manifest, options, progress)
    if chosen.fitted is not None:
        _check_form(chosen.fitted, isinstance(pack.layout, PlaneLayout), options.misses if unsaid else Misses())
    stream = LayerStream(folder, torch.float32)
    layers = find_layers(stream.model)
    check_layers(folder, manifest, layers)
    check_fits(pack, layers, manifest["n_sub"], manifest["gates"])
    layer_parts = stored_parts(layers, pack, manifest["n_sub"], manifest["gates"], tensors)
    model = stream.keep_outside([name for layer in layers for name in layer.owners])
    memory = options.memory or memory_for_experts(cache_bytes(model, options.cache_tokens))
    slots = slots_in(memory, resident_bytes(layer_parts), pack.layout.bytes, len(pack.space), pack.layout.planes)
    group = experts_per_token(model, layer_parts[0].layer) * pack.space.parts
    if isinstance(pack.layout, PlaneLayout):
        group = max(group, 2 * pack.layout.planes)  # a pool of one layer then holds both planes of a block
    like, eviction = layer_parts[0].layer, chosen.eviction(pack.space, slots, group)
    elsewhere = None if chosen.fitted is None else measured_elsewhere(chosen.fitted)
    if elsewhere is not None:
        logger.warning("the settings were fitted with what deciding costs on '%s'; fit them again on this machine", elsewhere)
    slow = request_seconds(eviction, pack.space, slots)
    if slow is not None:
        logger.warning(
            "the policy '%s' has no compiled table: a layer asks it for %.0f us, `lru` for %.0f, and every layer takes the longer way",
            chosen.policy, *(1e6 * seconds for seconds in slow),
        )  # fmt: skip
    guess = chosen.guess(pack.space, like.hidden)._replace(tried=options.tries_ahead, horizon=options.horizon)
    if isinstance(pack.layout, PlaneLayout):
        planes = PlaneStore(pack, slots, like, eviction, reader=options.reader)
        bits = None if chosen.fitted is None else chosen.fitted.expert_bits
        model._moe_prism = PlaneElastic(model, layer_parts, planes, misses=options.misses, ahead=guess, expert_bits=bits)
    else:
        store = _opened(pack, slots, like, eviction, options)
        model._moe_prism = StoredElastic(model, layer_parts, store, misses=options.misses, ahead=guess)
    if options.memory is None:
        kept = model._moe_prism.store
        kept.on_step = FirstSteps(kept)
        logger.info(
            "memory: %.2f of %.2f GiB of experts, %.2f GiB for a cache of %d tokens, %.2f GiB stay free",
            *(n / 2**30 for n in (slots * pack.layout.bytes, len(pack.space) * pack.layout.bytes)),
            cache_bytes(model, options.cache_tokens) / 2**30, options.cache_tokens, kept_free() / 2**30,
        )  # fmt: skip
    model._moe_prism.stored_bytes_per_weight = manifest["bytes_per_weight"]
    read_generation_config(model, folder)
    return model
