"""Three small tasks for EleutherAI's lm-eval, made of held-out Python source, so that it runs without a hub.

python -m tests.serve.lm_eval_tasks FOLDER
lm_eval ... --include_path FOLDER --tasks prism_next_line,prism_source,prism_complete_line
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from moe_prism.data import read_documents, split_documents

TASKS = {
    "prism_next_line": """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
""",
    "prism_source": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "prism_complete_line": """\
output_type: generate_until
doc_to_text: "{{begun}}"
doc_to_target: "{{rest}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - {metric: exact_match}
""",
}


def write_tasks(folder: Path, questions: int = 100, documents: int = 12, seed: int = 0) -> Path:
    """One YAML file and one JSON-lines file per task. questions: of the two tasks about lines; documents: of the perplexity."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [d.text for d in split_documents(read_documents("stdlib"), "evaluation", source="stdlib")]
    rng = random.Random(seed)
    asked = [_question(rng, texts) for _ in range(questions)]
    rows = {
        "prism_next_line": [{k: q[k] for k in ("context", "choices", "answer")} for q in asked],
        "prism_source": [{"text": text[:9000]} for text in rng.sample(texts, documents)],
        "prism_complete_line": [{k: q[k] for k in ("begun", "rest")} for q in asked],
    }
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        files = f"dataset_kwargs: {{data_files: {{test: {data.resolve()}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: json\n{files}test_split: test\n{task}")
    return folder


def _question(rng: random.Random, texts: list[str]) -> dict[str, object]:
    """Twelve lines of a file, and four lines of which one comes next; the same with that line begun, and its last third."""
    own, *others = rng.sample([t for t in texts if t.count("\n") > 60], 4)
    lines = own.split("\n")
    at = rng.choice([i for i in range(12, len(lines)) if len(lines[i].strip()) > 8])
    wrong = [rng.choice([line for line in other.split("\n") if len(line.strip()) > 8]) for other in others]
    choices = [lines[at], *wrong]
    rng.shuffle(choices)
    context = "\n".join(lines[at - 12 : at]) + "\n"
    cut = len(lines[at]) * 2 // 3
    begun, rest = context + lines[at][:cut], lines[at][cut:]
    return {"context": context, "choices": choices, "answer": choices.index(lines[at]), "begun": begun, "rest": rest}


if __name__ == "__main__":
    print(write_tasks(Path(sys.argv[1])))
