"""Symbolic-MoE (arXiv 2503.05641): models are recruited by the skills that a question needs, and questions are grouped by model.

The paper asks a language model for a question's skills and compares them by sentence embeddings. Neither is here: a skill is a word that
several recorded questions have, unless the record says the skills, and words are compared by their letters. A model's profile has +1 for
every recorded question with the skill on which it was nearer to the best option than to the worst, and -1 for every other.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from .base import Chooser, Floats, ModelOption, Record, SubsetLimits, recorded, within
from .text import embed_all, words

T = TypeVar("T")
M = TypeVar("M")
MOST_SKILLS = 512
EMBEDDING = 128
LIKE = 0.3
"""Cosine from which a word is taken for a skill that it is not."""


@dataclass(frozen=True)
class SkillParameters:
    """recruits: models drawn for a question, with replacement. least: the share of all questions below which a model is dropped.

    temperature: of the softmax over models. skills: words of a question that count as its skills.
    """

    recruits: int = 3
    least: float = 0.05
    temperature: float = 0.5
    skills: int = 8


class Symbolic(Chooser):
    """By suitability: the sum of a model's profile over the question's skills, times its strength over all skills."""

    Parameters = SkillParameters

    def __init__(self, used: Sequence[int], known: Sequence[str], profile: Floats, settings: SkillParameters) -> None:
        """profile: [S, O], of the known skills, each divided by the number of its questions."""
        self.known, self.profile, self.settings = list(known), profile, settings
        self._places = {skill: i for i, skill in enumerate(self.known)}
        self._vectors = embed_all(self.known, EMBEDDING)
        raised = np.exp(profile.mean(0) / settings.temperature)
        self.strength = raised / raised.max()
        self.used = sorted(used)

    @classmethod
    def fit(cls, options: Sequence[ModelOption], record: Record | None, limits: SubsetLimits, settings: Any) -> Symbolic:
        record = recorded(record, "symbolic")
        record.check(len(options))
        used = within(options, record, limits)
        asked = record.skills or [words(text) for text in record.texts]
        counted = Counter(skill for own in asked for skill in {*own})
        most = len(record.texts) // 2 if not record.skills else len(record.texts)  # a word of half the questions tells none apart
        usual = [skill for skill, n in counted.most_common() if 2 <= n <= max(2, most)][:MOST_SKILLS]
        known = usual or [skill for skill, _ in counted.most_common(MOST_SKILLS)] or [""]
        middle = (record.quality.max(1, keepdims=True) + record.quality.min(1, keepdims=True)) / 2
        marks = np.where(record.quality >= middle, 1.0, -1.0)
        rows = [[q for q, own in enumerate(asked) if skill in own] or list(range(len(asked))) for skill in known]
        made = cls(used, known, np.stack([marks[own].mean(0) for own in rows]), settings)
        named = [[made._places[skill] for skill in own if skill in made._places] for own in record.skills]
        recruits = (made.recruit(text, named[q] if named else None) for q, text in enumerate(record.texts))
        drawn = Counter(o for own in recruits for o in {*own})
        often = [o for o in used if drawn[o] >= settings.least * len(record.texts)]
        made.used = often or used
        return made

    def chosen(self) -> list[int]:
        return list(self.used)

    def skills_of(self, text: str) -> list[int]:
        """Known skills of a question: its most frequent words that are known; else those nearest to its words by their letters."""
        found = [word for word, _ in Counter(words(text)).most_common()]
        exact = [self._places[word] for word in found if word in self._places][: self.settings.skills]
        if exact or not found:
            return exact
        near = embed_all(found[: self.settings.skills], EMBEDDING) @ self._vectors.T
        return [int(row.argmax()) for row in near if row.max() >= LIKE]

    def suitability(self, own: Sequence[int]) -> Floats:
        """[O], at least 0, for these skills; larger is better. Without any skill it is strength alone.

        A skill counts from 0, for a model that never has it, to 1: a product with the strength of a model must not turn its sign.
        """
        local = (1 + self.profile[list(own)]).sum(0) / 2 if own else np.ones_like(self.strength)
        return np.asarray(local * self.strength)

    def recruit(self, text: str, own: Sequence[int] | None = None) -> list[int]:
        """`recruits` options drawn with replacement from a softmax over suitability; the text is the seed. own: its skills; None: found."""
        said = self.suitability(self.skills_of(text) if own is None else own)[self.used] / self.settings.temperature
        share = np.exp(said - said.max())
        drawn = np.random.default_rng(zlib.crc32(text.encode("utf-8", "replace")))
        return [self.used[i] for i in drawn.choice(len(self.used), self.settings.recruits, p=share / share.sum())]

    def order(self, text: str, allowed: Sequence[int]) -> list[int]:
        said = self.suitability(self.skills_of(text))
        return sorted((o for o in self.used if o in allowed), key=lambda o: (-said[o], o))


def by_model(recruits: Sequence[Sequence[M]]) -> dict[M, list[int]]:
    """Model -> the questions that want it, each once, in the order in which models are first wanted."""
    found: dict[M, list[int]] = {}
    for question, own in enumerate(recruits):
        for model in dict.fromkeys(own):
            found.setdefault(model, []).append(question)
    return found


def answer_grouped(recruits: Sequence[Sequence[M]], load: Callable[[M], Callable[[int], T]]) -> list[Mapping[M, T]]:
    """For every question the answers of its models. Every model is loaded once and answers all its questions before the next is loaded.

    load(model): something that answers a question by its number.
    """
    found: list[dict[M, T]] = [{} for _ in recruits]
    for model, questions in by_model(recruits).items():
        answer = load(model)
        for question in questions:
            found[question][model] = answer(question)
    return [{model: own[model] for model in dict.fromkeys(asked)} for own, asked in zip(found, recruits, strict=True)]


def vote(answers: Mapping[M, T], recruits: Sequence[M]) -> T:
    """The answer that most recruits gave, one that was drawn twice counts twice; the first such one where several have as many."""
    counted: Counter[Any] = Counter()
    for model in recruits:
        counted[answers[model]] += 1
    return max(counted, key=lambda said: counted[said])  # type: ignore[no-any-return]
