"""Prompts with the model's own answers, as calibration text (EASY-EP, arXiv 2504.06792, calls them demonstrations)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Journal, OutputFolder
from ..data import Windows
from ..data.tasks import Task, read_tasks
from ..errors import UsageError
from ..options.calibrate import CalibrateOptions
from ..progress import Report

ANSWERS = "answers.jsonl"
BATCH = 8
LEAST_WINDOW = 8  # tokens


@dataclass(frozen=True)
class Demonstrations:
    """What is going to be asked: token ids of the prompts, in batches of one domain. left: tasks that are not, by reason."""

    batches: tuple[tuple[tuple[Task, list[int]], ...], ...]
    left: Mapping[str, int]
    read: tuple[dict[str, Any], ...]


def plan(tokenizer: Any, options: CalibrateOptions, longest: int) -> Demonstrations:
    """Which tasks fit into --tokens, each with as long an answer as it may have; of several domains, the same share of each.

    Raises UsageError where none does. longest: the model's context in tokens.
    """
    found, read = read_tasks(tokenizer, options.source)
    share = options.tokens // len(found)
    batches, long, beyond = [], 0, 0
    for domain, tasks in found.items():
        chosen, used = [], 0
        for task in tasks:
            ids = prompt_ids(tokenizer, task.prompt)
            if len(ids) + options.answer_tokens > longest:
                long += 1
            elif used and used + len(ids) + options.answer_tokens > share:
                beyond += 1
            else:
                used += len(ids) + options.answer_tokens
                chosen.append((task, ids))
        if not chosen:
            raise UsageError(
                f"no task of {f'domain {domain}' if domain else 'the file'} and an answer of {options.answer_tokens} tokens fit into the "
                f"model's context of {longest}",
                "give shorter prompts, or a smaller --answer-tokens",
            )
        batches += [tuple(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
    left = {"tasks longer than the context": long, "tasks beyond --tokens": beyond}
    return Demonstrations(tuple(batches), {k: n for k, n in left.items() if n}, tuple(read))


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids, opened by the tokenizer's document mark once."""
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if mark is None or ids[:1] == [mark] else [mark, *ids]


class Answering:
    """Answers of a model, batch by batch in the work folder, so that an interrupted run goes on after the last one."""

    def __init__(self, asked: Demonstrations, options: CalibrateOptions, folder: OutputFolder, journal: Journal) -> None:
        self.asked, self.options, self.folder, self.journal = asked, options, folder, journal

    def is_done(self) -> bool:
        """Whether there is nothing left for the model to do."""
        return all(self.journal.done(_unit(i)) for i in range(len(self.asked.batches)))

    @torch.no_grad()
    def run(self, model: Any, tokenizer: Any, report: Report) -> None:
        """Answer what has no answer yet."""
        with report("answer") as update:
            for i, batch in enumerate(self.asked.batches):
                if not self.journal.done(_unit(i)):
                    torch.manual_seed(self.options.seed + i)
                    rows = answer(model, tokenizer, [ids for _, ids in batch], self.options)
                    self._write(i, tokenizer, batch, rows)
                update(i + 1, len(self.asked.batches))

    def _write(self, i: int, tokenizer: Any, batch: Sequence[tuple[Task, list[int]]], rows: Sequence[list[int]]) -> None:
        ends = _ends(None, tokenizer)
        lines = []
        for (task, ids), row in zip(batch, rows, strict=True):
            said = tokenizer.decode(row, skip_special_tokens=True)
            whole = {"task": task.name, "domain": task.domain, "prompt": task.prompt, "answer": said}
            stopped = len(row) < self.options.answer_tokens or (row[-1:] and row[-1] in ends)
            facts = {"prompt_tokens": len(ids), "ended": "stop" if stopped else "length", "answer_ids": row}
            lines.append(json.dumps({**whole, **facts}, ensure_ascii=False))
        self.journal.finish(_unit(i), self.folder.write_bytes(_unit(i), ("\n".join(lines) + "\n").encode()))

    def collect(self, length: int) -> tuple[Windows, dict[str, Any]]:
        """Windows of all prompts with their answers, and the facts; answers.jsonl is written, the work files stay until the end.

        length: of a window at most; less where a domain's demonstrations are fewer tokens.
        """
        lines = [line for i in range(len(self.asked.batches)) for line in self._lines(i)]
        self.folder.write_bytes(ANSWERS, ("\n".join(lines) + "\n").encode())
        rows = [json.loads(line) for line in lines]
        ids: dict[str, list[int]] = {}
        documents: dict[str, None] = {}
        characters = 0
        asked = (pair for batch in self.asked.batches for pair in batch)
        for (task, prompt), row in zip(asked, rows, strict=True):
            ids.setdefault(task.domain, []).extend([*prompt, *row["answer_ids"]])
            said = task.prompt + row["answer"]
            documents |= {task.sha256: None, hashlib.sha256(said.encode()).hexdigest(): None}
            characters += len(said)
        length = min(length, *(len(each) for each in ids.values()))
        if length < LEAST_WINDOW:
            raise UsageError(
                f"the tasks and their answers are {length} tokens", f"give more tasks: at least {LEAST_WINDOW} tokens"
            )
        parts = {d: torch.tensor(each[: len(each) // length * length]).reshape(-1, length) for d, each in ids.items()}
        counts = tuple((d, len(each)) for d, each in parts.items())
        windows = Windows(
            torch.cat([*parts.values()]),
            self.options.source,
            "calibration",
            tuple(documents),
            characters,
            counts,
            self.asked.read,
        )
        facts = {
            "answered": len(rows),
            "answer_tokens": sum(len(row["answer_ids"]) for row in rows),
            "ended": sum(row["ended"] == "stop" for row in rows),
            **({"left_out": dict(self.asked.left)} if self.asked.left else {}),
        }
        return windows, {"tasks": facts}

    def discard(self) -> None:
        """Remove the work files."""
        for i in range(len(self.asked.batches)):
            self.folder.discard(_unit(i))

    def _lines(self, i: int) -> Iterator[str]:
        yield from (self.folder.work / _unit(i)).read_text("utf-8").rstrip("\n").split("\n")


def answer(model: Any, tokenizer: Any, prompts: Sequence[list[int]], options: CalibrateOptions) -> list[list[int]]:
    """New token ids after each prompt, the one that ends it included. Prompts are padded on the left."""
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    warm = options.temperature > 0
    drawing: dict[str, Any] = {"do_sample": warm, **({"temperature": options.temperature} if warm else {})}
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=options.answer_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **drawing,
    )
    return [_until(row, ends) for row in found[:, length:].tolist()]


def _until(row: list[int], ends: set[int]) -> list[int]:
    stop = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
    return row[:stop]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: of the model's generation config, and the tokenizer's own."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = given if isinstance(given, list | tuple) else [given]
    return {int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}


def _unit(i: int) -> str:
    return f"answers-{i:05d}.jsonl"
