"""What a recipe of a training names, looked up and checked: sizes, text or pictures, models to begin from and to follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..architectures import architectures
from ..architectures.base import Architecture, Picturing, TokenIds, TrainingPart
from ..architectures.parts import RouterLosses
from ..artefact.open import known_documents
from ..checkpoint.config import read_config
from ..checkpoint.manifest import source_facts
from ..compress.shape_search import shape_within
from ..data.training import token_streams
from ..elastic.runtime import experts_per_token
from ..errors import UsageError
from ..model import find_layers, load_model, load_tokenizer, resolve
from ..schema.training import ShapeForm, TrainingForm
from ..training.loop import Training, draw_weights
from ..training.next_token import NextToken
from ..training.teacher import AlikeExperts, Alone, Teacher

OF_TEXT = ("bytes", "length", "start", "teacher", "text", "tokenizer", "tokens")
"""What a recipe cannot say of a task that reads no text."""
STORED = {"float32": 4, "bfloat16": 2}


class TrainingJob:
    """A recipe with all that it names. UsageError before any long work."""

    def __init__(self, recipe: TrainingForm) -> None:
        self.recipe = recipe
        self.tokenizer: Any = None
        self.documents: tuple[str, ...] = ()
        kind = None if recipe.architecture is None else architectures.get(recipe.architecture)
        self.architecture: Architecture | None = None
        self.task: Picturing | None = None
        if kind is not None and recipe.model is not None:
            self.architecture = kind(recipe.model, recipe.settings)
            self.task = self.architecture.task()
        self.vocabulary = self._read_text() if self.task is None else self._read_pictures(self.task)
        if kind is not None and recipe.model is None:
            self.architecture = kind(self._shape(kind), recipe.settings)
            if self.architecture.task() is not None:
                raise UsageError(f"'{recipe.architecture}' learns from no text, and needs its own sizes", "give it model")
        self.config = None if self.architecture is None or recipe.start else self.architecture.config(self.vocabulary)
        models = {name: resolve(value) for name, value in self._models().items()}
        self.facts = {name: source_facts(folder) for name, folder in models.items()}
        seen = [document for folder in models.values() for document in known_documents(folder)]
        self.documents = tuple(dict.fromkeys([*self.documents, *seen]))

    def _models(self) -> dict[str, str]:
        return {name: value for name in ("start", "teacher") if (value := getattr(self.recipe, name)) is not None}

    def _shape(self, kind: type[Architecture]) -> ShapeForm:
        """Of a model that the recipe gives no sizes of."""
        recipe = self.recipe
        if recipe.bytes is not None:
            return shape_within(recipe.bytes, self.vocabulary.size, STORED[recipe.store], context=recipe.length, seed=recipe.seed)
        assert recipe.start is not None
        if not kind.adopts:
            raise UsageError(f"'{recipe.architecture}' is trained from nothing", "give model in the place of start")
        config = read_config(resolve(recipe.start))
        try:
            return ShapeForm(
                hidden=config.hidden_size, layers=config.num_hidden_layers, heads=config.num_attention_heads,
                experts=config.num_experts, width=config.intermediate_size, active=config.num_experts_per_tok,
                context=config.max_position_embeddings,
            )  # fmt: skip
        except (AttributeError, ValueError) as error:
            raise UsageError(
                f"'{recipe.start}' has no sizes that '{recipe.architecture}' knows", "start from an OLMoE"
            ) from error

    def _read_text(self) -> TokenIds:
        """Text of both sides, in tokens."""
        recipe = self.recipe
        if recipe.start is not None and "tokenizer" in recipe.model_fields_set:
            raise UsageError(f"'{recipe.start}' has a tokenizer of its own", "leave tokenizer out")
        self.tokenizer = t = load_tokenizer(recipe.start or recipe.tokenizer)
        self.data_names, self.positions, self.unit = recipe.text, recipe.length, NextToken.unit
        ends = t.eos_token_id if t.eos_token_id is not None else t.bos_token_id
        found = TokenIds(
            len(t), ends if t.bos_token_id is None else t.bos_token_id, ends, ends if t.pad_token_id is None else t.pad_token_id
        )
        least = max(2, recipe.batch) * recipe.length + 1
        streams = token_streams(t, recipe.text, tokens=recipe.tokens, seed=recipe.seed, least=least)
        self.data, self.documents = (streams.train, streams.held), streams.documents
        return found

    def _read_pictures(self, task: Picturing) -> TokenIds:
        """Examples of a task that reads no text. UsageError for a recipe that says something of text."""
        given = sorted(set(OF_TEXT) & self.recipe.model_fields_set)
        if given:
            raise UsageError(f"'{self.recipe.architecture}' learns from {task.what} and takes no '{given[0]}'", "leave it out")
        self.data_names, self.positions, self.unit = [task.what], task.positions, task.unit
        examples = task.examples()
        if len(examples.train) < self.recipe.batch:
            raise UsageError(f"there are {len(examples.train)} {task.what}, fewer than a batch", "lower batch")
        self.data, self.documents = (examples.train, examples.held), examples.documents
        return TokenIds(0, 0, 0, 0)

    def training(self) -> Training:
        """The model at its first step: with drawn weights, or with those that it begins from."""
        recipe = self.recipe
        if recipe.start is None:
            assert self.architecture is not None
            model = self.architecture.build(self.config)
            draw_weights(model, recipe.seed)
        else:
            source = load_model(recipe.start, torch.float32)
            self._check_context(source, recipe.start)
            model = source if self.architecture is None else self.architecture.adopt(source, recipe.seed)
        return Training(recipe, model, self._parts(model), self.data, self.task)

    def _parts(self, model: Any) -> Sequence[TrainingPart]:
        recipe = self.recipe
        found: list[TrainingPart] = [RouterLosses(recipe.balance, recipe.z)]
        if recipe.trained != "all":
            found.append(Alone(recipe.trained))
        found += [] if self.architecture is None else self.architecture.parts()
        if recipe.start is not None and self.architecture is None:
            found.append(AlikeExperts())
        if recipe.teacher is not None:
            teacher = load_model(recipe.teacher, torch.float32)
            self._check_context(teacher, recipe.teacher)
            own, theirs = (each.config.get_text_config().vocab_size for each in (model, teacher))
            if own != theirs:
                raise UsageError(f"the teacher knows {theirs:,} tokens and the model {own:,}", "give one with the same tokenizer")
            found.append(Teacher(teacher, recipe.distil))
        return found

    def _check_context(self, model: Any, name: str) -> None:
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and self.recipe.length > most:
            raise UsageError(f"length {self.recipe.length} is more than '{name}' can see", f"give at most {most}")

    def shape_of(self, model: Any) -> dict[str, int]:
        """Sizes for the card and the forecast of memory."""
        if self.architecture is not None:
            return self.architecture.shape.model_dump(include={"hidden", "layers", "experts", "width", "active"})
        layers = find_layers(model)
        first = layers[0]
        return {
            "hidden": first.hidden, "layers": len(layers), "experts": first.num_experts, "width": first.width,
            "active": experts_per_token(model, first),
        }  # fmt: skip

    @property
    def name(self) -> str:
        """Of what is trained."""
        return self.recipe.architecture or str(self.facts["start"]["name"])

    def inputs(self) -> dict[str, Any]:
        """What decides the result."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "settings": {} if self.architecture is None else self.architecture.settings.model_dump(mode="json"),
            "documents": list(self.documents),
            "threads": torch.get_num_threads(),
            **self.facts,
        }


def licences(folder: Path) -> list[Path]:
    """The files beside a model that say what may be done with it."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.upper().startswith(("LICEN", "NOTICE"))]
