"""Does the work on a client's text. Runs in a process that can be killed (see `workers`), or in a thread where there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .jobs import Compile, Compiled, Encode, Job, RenderChat, Result, Tokens, Unfit

OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Variables of a chat template that are no client's to set."""


SPACES = 16
"""White space between two parts of JSON; without a bound, a model that is unsure writes it for ever."""


@dataclass
class Desk:
    """template_bytes, grammar_bytes: bounds."""

    tokenizer: Any
    template_bytes: int
    grammar_bytes: int
    _compiler: Any = None
    _known: dict[str, _Known] = field(default_factory=dict)

    def do(self, job: Job) -> Result:
        """What comes of a job; an Unfit for one that cannot be done."""
        if isinstance(job, Encode):
            return self._encode(job)
        return self._chat(job) if isinstance(job, RenderChat) else self._compile(job)

    def _encode(self, job: Encode) -> Result:
        long = next((text for text in job.texts if job.most and len(text.encode()) > job.most), None)
        if long is not None:
            return too_long(len(long.encode()), "prompt")
        rows = self.tokenizer(job.texts, add_special_tokens=job.special)["input_ids"] if job.texts else []
        return Tokens([list(row) for row in rows])

    def _chat(self, job: RenderChat) -> Result:
        template = self._template(job.tools)
        if isinstance(template, Unfit):
            return template
        known = self._known.setdefault(template, _Known.of(template))
        refused = known.refuse(job)
        if refused:
            return refused
        try:
            text = self.tokenizer.apply_chat_template(  # it renders in a sandbox
                job.messages,
                tools=job.tools,
                tokenize=False,
                add_generation_prompt=job.open_turn,
                continue_final_message=job.continues,
                **job.variables,
            )
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            return Unfit(f"the chat template refused the messages: {type(error).__name__}", "messages")
        if job.most and len(text.encode()) > job.most:
            return too_long(len(text.encode()), "messages")
        return Tokens([list(self.tokenizer(text, add_special_tokens=job.special)["input_ids"])])

    def _template(self, tools: list[Any] | None) -> str | Unfit:
        """The template for this request: a tokenizer may have one for tools."""
        try:
            template = self.tokenizer.get_chat_template(None, tools)
        except ValueError:
            return Unfit("the model has no chat template for this request; use /v1/completions", "messages", "no_chat_template")
        if len(template.encode()) > self.template_bytes:
            return Unfit(
                f"the model's chat template is larger than {self.template_bytes} bytes (bounds.template_bytes)",
                "messages",
                "no_chat_template",
            )
        return str(template)

    def _compile(self, job: Compile) -> Result:
        param = "structured_outputs"
        try:
            import xgrammar
        except ImportError:
            return Unfit(
                "structured answers need xgrammar on the server: pip install 'moe-prism[structured]'", param, "unsupported"
            )
        if len(job.text.encode()) > self.grammar_bytes:
            return Unfit(f"the form is larger than {self.grammar_bytes} bytes (bounds.grammar_bytes)", param)
        try:
            if self._compiler is None:
                info = grammar_vocabulary(self.tokenizer, job.vocabulary, job.eos)
                self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
            return Compiled(_compiled(self._compiler, job).serialize_json())
        except Exception as error:  # noqa: BLE001 - xgrammar raises several kinds
            said = re.sub(r"^\[[^]]*\] \S+: ", "", str(error).strip().split("\n")[0])
            return Unfit(f"the form of the answer cannot be used: {said[:200]}", param)


def too_long(size: int, param: str) -> Unfit:
    """A text that cannot fit the context, whatever its tokens are."""
    return Unfit(f"{size} bytes are more than the context limit can hold", param, "context_length_exceeded")


def grammar_vocabulary(tokenizer: Any, vocabulary: int, eos: Iterable[int]) -> Any:
    """xgrammar's view of a tokenizer; the same here and in the engine."""
    import xgrammar

    return xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(eos))


def _compiled(compiler: Any, job: Compile) -> Any:
    if job.kind == "json":
        return compiler.compile_json_schema(job.text, max_whitespace_cnt=SPACES)
    if job.kind == "json_object":
        return compiler.compile_json_schema('{"type": "object"}', max_whitespace_cnt=SPACES, strict_mode=False)
    if job.kind == "regex":
        return compiler.compile_regex(job.text)
    if job.kind == "choice":
        return compiler.compile_grammar("root ::= " + " | ".join(json.dumps(choice) for choice in json.loads(job.text)))
    return compiler.compile_grammar(job.text)


@dataclass(frozen=True)
class _Known:
    """What a template reads. variables: names that are set outside of it; mentions: all names and keys in it."""

    variables: frozenset[str]
    mentions: frozenset[str]

    @classmethod
    def of(cls, template: str) -> _Known:
        from jinja2 import Environment, TemplateError, meta, nodes

        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)  # noqa: S701 - parsed, never rendered
        except TemplateError:
            words = frozenset(re.findall(r"\w+", template))  # transformers has a tag of its own
            return cls(words, words)
        mentions = {node.attr for node in tree.find_all(nodes.Getattr)}
        mentions |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return cls(frozenset(meta.find_undeclared_variables(tree)), frozenset(mentions))

    def refuse(self, job: RenderChat) -> Unfit | None:
        """A part of the request that the template would drop."""
        free = {name for name in self.variables - OURS if not name.endswith("_token")}  # the tokenizer sets those
        wrong = next((name for name in job.variables if name not in free), None)
        if wrong is not None:
            param = wrong if wrong == "reasoning_effort" else f"chat_template_kwargs.{wrong}"
            names = ", ".join(sorted(free)) or "none"
            return Unfit(
                f"the model's chat template has no variable '{wrong[:64]}'; it has: {names}"[:400], param[:128], "unsupported"
            )
        if job.tools and "tools" not in self.variables:
            return Unfit("the model's chat template takes no tools", "tools", "unsupported")
        for i, message in enumerate(job.messages):
            for key in message:
                if key not in ("role", "content") and key not in self.mentions:
                    return Unfit(
                        f"the model's chat template does not know '{key[:64]}' of a message",
                        f"messages.{i}.{key[:64]}",
                        "unsupported",
                    )
        return None
