"""Published systems that this library sets out to hold, and how much of each works here today. One line is one system.

P: the parts of MoE-Prism. 1 to 55: systems for cheaper MoE models. S: the parts of a study of expert skipping. A line that is changed here
changes docs/reference/systems.md (`make reference`); tests/docs/test_reference.py checks that what a line names exists. `evidence.py` has
what each of them claims and what it gave here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["weights", "routing", "offload", "placement", "serving", "metrics", "architecture", "outside"]
"""What a system changes: weights of a checkpoint; which experts run; what is in fast memory; which device holds what; which request runs.

metrics: nothing, it measures. architecture: the model before it is trained. outside: no MoE layer, or experts that are whole models.
"""
State = Literal["works", "in part", "not yet"]


@dataclass(frozen=True)
class System:
    """One system. paper: arXiv id. what: its idea in a line.

    command: what runs it today, a command line or "package.module:attribute"; empty: nothing does. missing: what a state `in part` lacks.
    uses: "kind/name" of what it is made of, kinds as `moe-prism ls` takes them.
    """

    number: str
    name: str
    paper: str
    kind: Kind
    what: str
    state: State = "not yet"
    command: str = ""
    uses: tuple[str, ...] = ()
    missing: str = ""


SYSTEMS = (
    System("P1", "MoE-Prism: profiler", "2510.19366", "metrics", "activations of every expert's neurons on the tokens routed to it", "works", "moe-prism calibrate nano --out calibration --collectors counts,tokens", ("collectors/counts", "collectors/tokens")),
    System("P2", "MoE-Prism: partition solver", "2510.19366", "weights", "deals neurons to sub-experts so that few sub-experts carry a token", "works", "moe-prism refactor nano --out elastic --solver sa --objective paper", ("solvers/sa", "solvers/greedy", "objectives/paper")),
    System("P3", "MoE-Prism: gate neurons", "2510.19366", "routing", "a few central neurons stand for the output of their sub-expert", "works", "moe-prism refactor nano --out elastic --gates 4 --gate-choice centrality", ("gates/centrality", "gates/centrality-expert", "scorers/gates")),
    System("P4", "MoE-Prism: training-free gating", "2510.19366", "routing", "a fixed number of sub-experts for each rank of the router's choice", "works", "moe-prism frontier elastic --methods pattern", ("methods/pattern",)),
    System("P5", "MoE-Prism: linear gate, untrained", "2510.19366", "routing", "siblings share the score of their expert, so whole experts go", "works", "moe-prism frontier elastic --methods whole-experts", ("methods/whole-experts",)),
    System("P6", "MoE-Prism: linear gate, fine-tuned", "2510.19366", "routing", "a router over all sub-experts, trained while K rises", "works", "moe-prism recover FOLDER --out trained --method router", ("recoveries/router",)),
    System("P7", "MoE-Prism: cost model and virtual queues", "2510.19366", "serving", "a queue per K; the batch of the most predicted tokens per second starts", "works", "moe-prism serve elastic --policy prism --save-cost cost.json", ("policies/prism", "policies/edf", "policies/full-batch")),
    System("P8", "MoE-Prism: offloading", "2510.19366", "offload", "sub-experts are loaded when they are wanted, in place of whole experts", "in part", "moe-prism generate elastic --prompt TEXT --rule pattern --budget 0.5 --expert-memory 5MB --expert-policy lru", ("cache-policies/lru", "methods/pattern"), "copies to a GPU; a simulated device stands for it"),
    System("1", "HEAPr", "2509.22299", "weights", "prunes single neurons of all experts by second-order saliency", "works", "moe-prism compress nano --out narrow --method heapr --keep 0.75", ("methods/heapr", "collectors/neurons", "collectors/gradients")),
    System("2", "Compressed Experts", "2503.00634", "weights", "the lower experts of a token become learned scaling vectors on the upper ones", "in part", "moe-prism frontier nano --out report --methods compressed-experts", ("methods/compressed-experts",), "training of the vectors with the model; here they are fitted layer by layer"),
    System("3", "Dynamic-MoE", "2403.07652", "routing", "as many experts as a share of the router's probability needs", "works", "moe-prism train recipes/zoo/dynamic-moe.yaml -o dynamic-moe", ("architectures/dynamic-moe", "methods/top-p", "methods/score-mass")),
    System("4", "MC#", "2510.10962", "weights", "bits for each expert, and a learned mask of experts for each token", "works", "moe-prism frontier nano --out report --methods pmq", ("methods/pmq", "methods/otp")),
    System("5", "MC-MoE", "2410.06270", "weights", "bits for each expert by an integer program, and a rule that skips the second expert", "works", "moe-prism frontier nano --out report --methods odp", ("methods/pmq", "methods/odp", "methods/naee")),
    System("6", "ExpertRAG", "2504.08744", "outside", "theory of a gate that decides whether to retrieve text", "in part", "moe-prism generate nano --prompt TEXT --decode expert-rag:0.5 --retriever FILE.py:FUNCTION", ("methods/expert-rag",), "experts and text chosen together, of which there is theory alone"),
    System("7", "Sub-MoE", "2506.23266", "weights", "merges clusters of experts in a subspace that they share", "works", "moe-prism compress nano --out merged --method sub-moe --keep 0.75", ("methods/sub-moe", "collectors/grams", "collectors/inputs")),
    System("8", "Agentic MI", "2512.21720", "outside", "mutual information of a text and its summary says how good a pipeline is", "works", "moe_prism.frontier.information:answer_information"),
    System("9", "D²MoE", "2504.15299", "offload", "bit-nested weights, bits by token, hottest expert loaded first", "in part", "moe-prism frontier nano --out report --methods d2moe", ("methods/d2moe", "codecs/nested", "cache-policies/d2moe"), "a bit router that is trained with the model, and a store that works on records as they arrive, hottest first (`benchmarks/orders.py`)"),
    System("10", "EASY-EP", "2504.06792", "weights", "keeps the experts that a domain needs, from a few demonstrations", "works", "moe-prism prune nano --out half --criterion easy-ep --keep 0.5", ("methods/prune:easy-ep", "collectors/outputs")),
    System("11", "Super Experts", "2507.23279", "metrics", "finds the few experts behind massive activations, to protect them", "works", "moe-prism prune nano --out half --protect super-experts", ("protections/super-experts",)),
    System("12", "MC-SMoE", "2310.01334", "weights", "merges experts around the most used ones, then low rank and sparse", "in part", "moe-prism compress nano --out merged --method mc-smoe --keep 0.75", ("methods/m-smoe", "methods/mc-smoe", "collectors/pairs", "codecs/low-rank-sparse"), "rows that are chosen in training; `train` tunes merged experts"),
    System("13", "CoE", "2506.18945", "architecture", "several routed passes in one layer", "works", "moe-prism train recipes/zoo/chain-of-experts.yaml -o chain-of-experts", ("architectures/chain-of-experts",)),
    System("14", "ExpertFlow", "2410.17954", "offload", "predicts all layers' experts ahead and regroups tokens", "in part", "moe-prism generate elastic --prompt TEXT --expert-memory 5MB --expert-predictor path --expert-settings settings.json", ("predictors/path",), "slots that follow predicted need while it runs (`offload fit` gives them out once), and regrouping of tokens"),
    System("15", "SparseUnified", "2512.02351", "weights", "splits a dense layer into experts by the importance of its neurons", "in part", "moe-prism split FOLDER --out moe --method importance", ("splits/importance",), "dense first and last layers; `train` goes on after the split"),
    System("16", "MoE²", "2501.09410", "outside", "chooses language models on edge devices under limits of time and energy", "works", "moe-prism route pool.yaml --measure questions.jsonl --out record.json", ("choosers/moe2",)),
    System("17", "ComPEFT", "2311.13171", "outside", "fine-tuned changes as sparse signs and one scale", "works", "moe-prism adapter TUNED --base nano --out FOLDER --pack 0.2", ("codecs/compeft",)),
    System("18", "Survey of MoE inference", "2412.14219", "metrics", "orders the literature by model, system and hardware", "in part", "moe-prism ls systems", (), "the survey's own taxonomy, in place of the kinds of this table"),
    System("19", "CAMERA", "2508.02322", "weights", "energy of single neurons: prune them, or give them bits", "in part", "moe-prism compress nano --out narrow --method camera --keep 0.75", ("methods/camera", "methods/camera-q"), "layers scored one after the other on what the edited ones give; GPTQ inside bands"),
    System("20", "Sigma-MoE-Tiny", "2512.16248", "architecture", "one expert of 96 per token, with a schedule of sparsity", "works", "moe-prism train recipes/zoo/sigma-moe.yaml -o sigma-moe", ("architectures/sigma-moe",)),
    System("21", "MoTE", "2506.14435", "architecture", "ternary experts beside the frozen dense layer", "works", "moe-prism train recipes/zoo/mote.yaml -o mote", ("architectures/mote", "codecs/ternary")),
    System("22", "HOBBIT", "2411.01433", "offload", "low precision or nothing for the less important missing experts", "in part", "moe-prism generate elastic --prompt TEXT --expert-memory 5MB --expert-policy hobbit --expert-settings settings.json --miss-shares 0.6,0.9 --expert-ahead 4 --expert-horizon 3", ("cache-policies/hobbit", "predictors/gate"), "a pool for each precision, which reads more than one for both (`benchmarks/plane_pools.py`)"),
    System("23", "PreMoe", "2505.17639", "weights", "keeps a set of experts for each task and loads the nearest to a prompt", "works", "moe-prism prune nano --out half --criterion premoe --keep 0.5", ("methods/prune:premoe", "collectors/confidence")),
    System("24", "S-MoE and A-MoE", "2505.00792", "routing", "smooths router scores over tokens that are alike", "works", "moe-prism train recipes/zoo/graph-of-tokens.yaml -o graph-of-tokens", ("architectures/graph-of-tokens", "methods/graph", "methods/attention-graph")),
    System("25", "DeepSeekMoE", "2401.06066", "architecture", "many narrow experts beside shared ones", "works", "moe-prism train recipes/zoo/deepseek-moe.yaml -o deepseek-moe", ("architectures/deepseek-moe", "families/deepseek_v2", "families/deepseek_v3")),
    System("26", "STUN", "2409.06211", "weights", "prunes experts that behave alike, then single weights", "in part", "moe-prism compress nano --out sparse --method stun --keep 0.5", ("methods/stun", "methods/wanda", "collectors/pairs"), "means of clusters and of their router rows where a layer keeps two of them or fewer"),
    System("27", "Local routing consistency", "2505.16056", "metrics", "how well one set of experts serves a stretch of tokens: SRP and SCH", "works", "moe-prism inspect nano --routing", ("cache-policies/sch",)),
    System("28", "UoE", "2503.02495", "architecture", "an exact split of dense layers and attention into experts, with two routers", "in part", "moe-prism train recipes/zoo/union-of-experts.yaml -o union-of-experts", ("architectures/union-of-experts", "splits/equal"), "attention that saves what heads are not chosen"),
    System("29", "Rocket", "2408.15915", "outside", "chooses adapters and data for a task, and mixes the adapters", "in part", "moe-prism route pool.yaml --measure questions.jsonl --out record.json", ("choosers/rocket", "codecs/compeft"), "the choice of training data near the shots, and training of adapters and gate together"),
    System("30", "QuantMoE-Bench", "2406.08155", "weights", "bits by rules of structure and by outliers", "works", "moe-prism frontier nano --out report --methods quantmoe", ("methods/quantmoe",)),
    System("31", "ReXMoE", "2510.17483", "architecture", "a router may choose experts of neighbouring layers", "in part", "moe-prism train recipes/zoo/rexmoe.yaml -o rexmoe", ("architectures/rexmoe",), "one cached expert for all layers of a group, and serving in vLLM"),
    System("32", "Rewiring", "2510.14853", "routing", "router biases tuned on the prompt while it runs", "in part", "moe-prism generate nano --prompt TEXT --rewire 5", ("methods/rewiring",), "fitting again while it generates"),
    System("33", "AdaMoE", "2406.13233", "architecture", "experts that do nothing beside the real ones, and a larger k", "works", "moe-prism train recipes/zoo/adamoe-nano.yaml -o adamoe", ("architectures/adamoe",)),
    System("34", "Read-ME", "2410.19123", "weights", "a dense model as domain experts, one router ahead of all layers, batches by expert", "in part", "moe-prism split FOLDER --out moe --method read-me", ("splits/read-me", "cache-policies/belady", "architectures/read-me"), "experts that overlap, and a scheduler that takes batches by expert"),
    System("35", "MoETuner", "2502.06643", "placement", "places experts by two integer programs: load, then traffic", "works", "moe-prism place nano --out placement.json --devices 8", ("placements/moetuner", "placements/eplb")),
    System("36", "EAQuant", "2506.13329", "weights", "one smoothing vector for all experts and the router before quantization", "in part", "moe-prism compress nano --out even --method eaquant:bits=4:group=128", ("methods/eaquant",), "rotations, and factors between up and down"),
    System("37", "MoE++", "2410.07348", "architecture", "experts that give nothing, a copy or a constant, and gates that see the layer before", "works", "moe-prism train recipes/zoo/moe-plus-plus.yaml -o moe-plus-plus --set settings.capacity=1.1", ("architectures/moe-plus-plus", "families/longcat_flash")),
    System("38", "Compressor", "2208.07120", "outside", "a genetic search for a tiny architecture, then distillation", "works", "moe-prism train recipes/zoo/compressor.yaml -o student", ("architectures/top-k", "methods/mixed")),
    System("39", "Fate", "2502.12224", "offload", "the next layer's router on this layer's input says what to load", "in part", "moe-prism generate elastic --prompt TEXT --expert-memory 5MB --expert-ahead 8 --prompt-rate 0.3", ("predictors/gate", "cache-policies/arc-fate"), "a width measured at start (`offload fit` takes it from a forecast), and pinned shallow layers"),
    System("40", "Symbolic-MoE", "2503.05641", "outside", "whole models chosen for a question by skill, grouped by model", "in part", "moe-prism route pool.yaml --measure questions.jsonl --out record.json", ("choosers/symbolic",), "skills that a language model names, an embedding of sentences, and a model that aggregates (here a vote)"),
    System("41", "Hecate", "2502.02581", "placement", "experts sharded over all devices, gathered sparsely each training step", "works", "moe_prism.placement.hecate:simulate_training", ("placements/eplb",)),
    System("42", "ExpertWeave", "2508.17624", "serving", "many fine-tunes of experts served over one base", "in part", "moe-prism serve nano --adapter NAME=FOLDER", ("codecs/compeft",), "a fused look-up in a GPU's kernel; on a GPU the room for experts is taken at once"),
    System("43", "SSR", "2511.08972", "routing", "optimal transport balances the router on some training steps", "works", "moe-prism train recipes/zoo/sinkhorn.yaml -o sinkhorn", ("architectures/sinkhorn",)),
    System("44", "DERN", "2509.10377", "weights", "drops experts and moves their neurons to the ones that stay", "in part", "moe-prism compress nano --out fewer --method dern --keep 0.75", ("methods/dern",), "shares of the router's scores that move with neurons"),
    System("45", "EMS", "2412.08521", "outside", "evicts, then merges, entries of the attention cache", "in part", "moe-prism generate nano --prompt TEXT --kv-entries 256", (), "the paper's own scores and zero class, which are not public"),
    System("46", "DiT-MoE", "2407.11633", "architecture", "a sparse diffusion transformer for images", "works", "moe-prism train recipes/zoo/dit-moe.yaml -o dit-moe", ("architectures/dit-moe",)),
    System("47", "EdgeMoE", "2308.14352", "offload", "experts on storage, bits for each, loaded ahead by what came before", "in part", "moe-prism generate elastic --prompt TEXT --expert-memory 5MB --expert-policy edge-moe --expert-predictor dictionary --expert-settings settings.json", ("cache-policies/edge-moe", "predictors/dictionary", "methods/edge-moe"), "experts in other bits than 4 and 8 (`offload fit --planes`)"),
    System("48", "LLM-KICK", "2310.01382", "metrics", "questions of knowledge that show what perplexity hides", "in part", "moe-prism frontier nano --out report --judge all", ("slices/cloze", "slices/copy"), "questions of its data sets, summaries, and a model as a judge"),
    System("49", "RMoE", "2408.06793", "architecture", "a recurrent state runs through the routers of all layers", "works", "moe-prism train recipes/zoo/rmoe.yaml -o rmoe", ("architectures/rmoe",)),
    System("50", "ConCISE", "2505.04881", "outside", "shorter reasoning through confidence and early stops", "in part", "moe-prism generate nano --prompt TEXT --point concise.json", ("methods/concise",), "training on text made so, and phrases of confidence before a doubt"),
    System("51", "EControl", "2311.05645", "outside", "compressed communication with a controlled error, for training", "works", "moe-prism train recipes/zoo/top-k.yaml -o trained --set parts=2 --set exchange.share=0.01"),
    System("52", "SCMoE", "2405.14507", "routing", "contrasts the next tokens of strong and weak routing", "works", "moe-prism generate nano --prompt TEXT --decode scmoe:0.5", ("methods/scmoe", "routing-stages/rank")),
    System("53", "SlimMoE", "2506.18349", "weights", "narrows every expert in stages, with distillation between them", "in part", "moe-prism compress nano --out narrow --method slim --keep 0.75", ("methods/slim",), "attention groups; stages are made by `compress` and `train` in turn"),
    System("54", "SMoE-Dropout", "2303.01610", "architecture", "a fixed random router, while k grows in training", "works", "moe-prism train recipes/zoo/smoe-dropout.yaml -o smoe-dropout", ("architectures/smoe-dropout",)),
    System("55", "DES", "2509.22572", "routing", "searches over the number of experts when a question is hard", "works", "moe-prism generate nano --prompt TEXT --temperature 1 --decode des:8 --verifier FILE.py:FUNCTION", ("methods/des",)),
    System("S1", "Expert skipping by layer", "2505.03531", "routing", "numbers of experts along straight lines over the layers", "works", "moe-prism skip nano --method pattern-skip:4-2-1-3", ("methods/pattern-skip", "methods/uniform")),
    System("S2", "Expert pruning by count and position", "2505.03531", "weights", "random, structured, hard-count and soft-count choices of experts", "works", "moe-prism prune nano --out half --criterion soft-count", ("methods/prune:hard-count", "methods/prune:soft-count", "methods/prune:random", "methods/prune:odd", "methods/prune:even", "methods/prune:first-half", "methods/prune:last-half")),
    System("S3", "Distinct experts of a batch", "2505.03531", "metrics", "how many experts a batch reads, by its size and k", "works", "moe-prism forecast nano --concurrency 1,2,4,8,16,32"),
    System("S4", "Throughput by concurrency", "2505.03531", "serving", "tokens per second of skipping and pruning, few requests to many", "in part", "moe-prism forecast nano --measure", (), "times of pruned models, and predicted speed of plans whose counts differ by layer"),
)  # fmt: skip
