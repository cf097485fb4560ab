"""The one table of methods: everything that makes a model cheaper, by name. A method is one file and one line here.

`acts` says when a method acts, which is the part of an operating point that it fills in: weights (per checkpoint), routing and slots (per
token), decoding (per request).

What is no method by itself, a solver or a cache policy, has a registry in its own package; REGISTRIES says where.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from .registry import Entry, Registry

methods: Registry[type[Any]] = Registry(
    "method",
    {
        # slots: selection rules over sub-experts
        "product": Entry("moe_prism.elastic.rules.top_slots:TopSlots", "best K slots of a token by routing weight x predicted output norm (default for a count)", acts="slots"),
        "threshold": Entry("moe_prism.elastic.rules.threshold:Threshold", "every slot whose value passes a calibrated cutoff: a continuous dial (default for a budget)", acts="slots"),
        "bits": Entry("moe_prism.elastic.rules.bits:Bits", "a slot is read at 2 to 8 bits or not at all, by its value per byte", acts="slots"),
        "d2moe": Entry("moe_prism.elastic.rules.d2moe:D2Moe", "a width per token and expert, by the rounding error that is predicted (D2MoE)", acts="slots"),
        "first-slot": Entry("moe_prism.elastic.rules.first_slot:FirstSlot", "threshold, and an expert must be worth sending the token there: fewer experts, less traffic", acts="slots"),
        "batch-blocks": Entry("moe_prism.elastic.rules.batch_blocks:BatchBlocks", "threshold for the rows of a step together: blocks that several of them want are read first", acts="slots"),
        "layer-budgets": Entry("moe_prism.elastic.rules.layer_budgets:LayerBudgets", "the product rule with budgets per layer, allocated from each layer's profile", acts="slots"),
        "mass": Entry("moe_prism.elastic.rules.mass:Mass", "slots until they cover a share of the token's estimated output", acts="slots"),
        "pattern": Entry("moe_prism.elastic.rules.pattern:Pattern", "the paper's code: a fixed number of sub-experts per routing rank", acts="slots"),
        "whole-experts": Entry("moe_prism.elastic.rules.whole_experts:WholeExperts", "the paper's linear gate without training: whole experts by rank, ties by order", acts="slots"),
        # routing: which of the router's experts are computed
        "uniform": Entry("moe_prism.methods.skip.uniform:Uniform", "the same number of experts in every layer", acts="routing"),
        "pattern-skip": Entry("moe_prism.methods.skip.pattern_skip:PatternSkip", "counts along straight lines; :b-h-e-p, :descending (default), :ascending, :peak, :valley", acts="routing"),
        "sensitivity": Entry("moe_prism.methods.skip.sensitivity:Sensitivity", "counts by what each layer loses, improved together; :alone, :isolated (Alloc-MoE) without that", acts="routing"),
        "ser": Entry("moe_prism.methods.skip.ser:Ser", "per token: weights below a share of the largest are skipped; :K_MIN", acts="routing"),
        "naee": Entry("moe_prism.methods.skip.naee:Naee", "the same with thresholds per layer and rank from calibration quantiles", acts="routing"),
        "score-mass": Entry("moe_prism.methods.skip.score_mass:ScoreMassMethod", "per token: the fewest experts that hold a share of the routing weight", acts="routing"),
        "weight-cutoff": Entry("moe_prism.methods.skip.weight_cutoff:WeightCutoffMethod", "per token: weights below the layer's calibrated cutoff are skipped; :METHOD gives the counts", acts="routing"),
        "batch-redistribution": Entry("moe_prism.methods.skip.batch_redistribution:BatchMethod", "per batch: a layer's budget goes to the largest weights; :METHOD gives the counts", acts="routing"),
        "top-p": Entry("moe_prism.methods.skip.top_p:TopPMethod", "per token: the fewest of all experts that hold a layer's share of the probability; :MOST", acts="routing"),
        "odp": Entry("moe_prism.methods.skip.odp:Odp", "per token: small weights are skipped in a share of the layers, large tokens keep all (MC-MoE); :LAYERS", acts="routing"),
        "rewiring": Entry("moe_prism.methods.skip.rewiring:RewiringMethod", "vectors on the router's logits, by the loss of the text (Rewiring); per prompt with `generate --rewire`; :STEPS", acts="routing"),
        "graph": Entry("moe_prism.methods.skip.graph:Graph", "experts by the scores of like tokens before, mixed into a token's own (S-MoE); :A", acts="routing"),
        "attention-graph": Entry("moe_prism.methods.skip.attention_graph:AttentionGraphMethod", "the same by the tokens that the attention before the layer looks at (A-MoE); :A", acts="routing"),
        "otp": Entry("moe_prism.methods.skip.otp:Otp", "per token: a small trained network says how many of its experts are computed (MC#); :STEPS", acts="routing"),
        "lexi": Entry("moe_prism.methods.skip.lexi:Lexi", "counts by what fewer experts do to random inputs, from the weights alone (LExI)", acts="routing"),
        "compressed-experts": Entry("moe_prism.methods.skip.compressed_experts:CompressedExperts", "per token: experts that are skipped leave vectors that the others multiply by, fitted (Compressed Experts)", acts="routing"),
        "gate-threshold": Entry("moe_prism.methods.skip.gate_threshold:GateThreshold", "per token: neurons of the chosen experts with a small gate are left out (intra-expert sparsity)", acts="routing"),
        "blocks-and-neurons": Entry("moe_prism.methods.skip.blocks_and_neurons:BlocksAndNeurons", "threshold, and of kept blocks only the neurons with a large gate; :SHARE", acts="routing"),
        "alloc": Entry("moe_prism.methods.skip.alloc:Alloc", "per batch: counts of sensitivity:isolated go to the largest weights (Alloc-MoE); :METHOD", acts="routing"),
        "oea": Entry("moe_prism.methods.skip.oea:Oea", "per batch: a token's first experts, and those of its others that the batch reads anyway (OEA)", acts="routing"),
        "xshare": Entry("moe_prism.methods.skip.xshare:XShare", "per batch: a share of the experts is read, the best for all; tokens choose among them (XShare)", acts="routing"),
        # decoding: how the next token follows from one or several forwards
        "self-draft": Entry("moe_prism.methods.decode.self_draft:SelfDraft", "the model drafts tokens at a low budget and checks them together at its own: the same answer; :BUDGET", acts="decoding"),
        "scmoe": Entry("moe_prism.methods.decode.scmoe:Scmoe", "two forwards per token, strong and weak routing, and their contrast (SCMoE); :BETA", acts="decoding"),
        "des": Entry("moe_prism.methods.decode.des:Des", "beams with different numbers of experts, of which a verifier keeps the best (DES); :BEAMS", acts="decoding"),
        "concise": Entry("moe_prism.methods.decode.concise:Concise", "a probe after every step of reasoning ends it where the model is sure (ConCISE); :THRESHOLD", acts="decoding"),
        "expert-rag": Entry("moe_prism.methods.decode.expert_rag:ExpertRag", "text is retrieved where the routers are unsure of the prompt (after ExpertRAG); :THRESHOLD", acts="decoding"),
        # weights: experts in fewer bits, by a codec
        "rtn": Entry("moe_prism.methods.quantize.uniform_bits:UniformBits", "whole numbers of 1 to 8 bits, rounded to nearest; :BITS", acts="weights"),
        "nested": Entry("moe_prism.methods.quantize.uniform_bits:UniformBits", "2 to 8 bits from one file (MWQ); :BITS", acts="weights"),
        "fp8-block": Entry("moe_prism.methods.quantize.uniform_bits:UniformBits", "8-bit floats in blocks", acts="weights"),
        "mxfp4": Entry("moe_prism.methods.quantize.uniform_bits:UniformBits", "4-bit floats in groups of 32", acts="weights"),
        "binary": Entry("moe_prism.methods.quantize.uniform_bits:UniformBits", "signs and one size per group", acts="weights"),
        "ternary": Entry("moe_prism.methods.quantize.uniform_bits:UniformBits", "-1, 0, 1 and one size per group (MoTE)", acts="weights"),
        "low-rank-sparse": Entry("moe_prism.methods.quantize.uniform_bits:UniformBits", "two thin matrices and the rows that they miss most (MC-SMoE); :BITS", acts="weights"),
        "pmq": Entry("moe_prism.methods.quantize.pmq:Pmq", "1 to 3 bits per expert, by what a width does to its layer (MC-MoE); :BITS", acts="weights"),
        "quantmoe": Entry("moe_prism.methods.quantize.quantmoe:QuantMoe", "4 bits for experts that a rule favours, 2 for the rest; :frequency (default), :first, :outliers, :turns", acts="weights"),
        "camera-q": Entry("moe_prism.methods.quantize.camera_q:CameraQ", "1 to 3 bits per neuron, by the energy that it puts into its layer's output (CAMERA-Q); :BITS", acts="weights"),
        "eaquant": Entry("moe_prism.methods.quantize.eaquant:EaQuant", "inputs evened out by one vector per layer, then rounded to nearest (EAQuant); :BITS", acts="weights"),
        "edge-moe": Entry("moe_prism.methods.quantize.edge_moe:EdgeMoe", "2 to 8 bits per expert by what the model loses with it alone, within a bound of KL (EdgeMoE); :BOUND", acts="weights"),
        # weights: experts without some of their neurons
        "heapr": Entry("moe_prism.methods.neurons.heapr:Heapr", "neurons go by what the loss feels of them to second order, one ranking of the model (HEAPr); :KEEP", acts="weights"),
        "camera": Entry("moe_prism.methods.neurons.camera:CameraP", "neurons go by the energy that they put into their layer's output (CAMERA-P); :KEEP", acts="weights"),
        "slim": Entry("moe_prism.methods.neurons.slim:Slim", "equally narrow experts, neurons go by the slope of the loss (SlimMoE); :KEEP", acts="weights"),
        "wanda": Entry("moe_prism.methods.neurons.wanda:Wanda", "neurons go by weight x activation, with a budget per layer from outliers (Wanda, OWL); :KEEP", acts="weights"),
        "magnitude": Entry("moe_prism.methods.neurons.magnitude:Magnitude", "neurons go by the size of their weights; :KEEP", acts="weights"),
        "random-neurons": Entry("moe_prism.methods.neurons.random_neurons:RandomNeurons", "neurons go by a uniform draw; :KEEP", acts="weights"),
        # weights: several experts share one set of weights
        "mixed": Entry("moe_prism.methods.mixed:LayerMix", "neurons, bits and experts per token of every layer, chosen together under limits on memory and bytes read", acts="weights"),
        "m-smoe": Entry("moe_prism.methods.merge.m_smoe:MSmoe", "experts become one with a more used one that the router scores alike (M-SMoE); :KEEP", acts="weights"),
        "mc-smoe": Entry("moe_prism.methods.merge.mc_smoe:McSmoe", "m-smoe, then two thin matrices and the rows that they miss most (MC-SMoE); :KEEP", acts="weights"),
        "sub-moe": Entry("moe_prism.methods.merge.sub_moe:SubMoe", "experts of alike outputs become one, whole or in thin matrices (Sub-MoE); :KEEP", acts="weights"),
        "stun": Entry("moe_prism.methods.merge.stun:Stun", "of experts chosen together one stays, then single weights go (STUN, Wanda); :KEEP", acts="weights"),
        "dern": Entry("moe_prism.methods.merge.dern:Dern", "experts go, and their neurons join similar ones in those that stay (DERN); :KEEP", acts="weights"),
        # weights: criteria of expert pruning, measured in mask mode as prune:CRITERION
        "random": Entry("moe_prism.methods.prune.random_draw:RandomDraw", "a uniform draw, by --seed", acts="weights"),
        "odd": Entry("moe_prism.methods.prune.position:Odd", "experts with odd ids, counted from 0", acts="weights"),
        "even": Entry("moe_prism.methods.prune.position:Even", "experts with even ids, counted from 0", acts="weights"),
        "first-half": Entry("moe_prism.methods.prune.position:FirstHalf", "the lower ids", acts="weights"),
        "last-half": Entry("moe_prism.methods.prune.position:LastHalf", "the higher ids", acts="weights"),
        "hard-count": Entry("moe_prism.methods.prune.count:HardCount", "how often an expert is chosen (SEER-MoE)", acts="weights"),
        "soft-count": Entry("moe_prism.methods.prune.count:SoftCount", "router probability over all tokens (SEER-MoE)", acts="weights"),
        "soft-selected": Entry("moe_prism.methods.prune.count:SoftSelected", "routing weight over the tokens that chose the expert", acts="weights"),
        "gate-norm": Entry("moe_prism.methods.prune.norm:GateNorm", "mean routing weight x output norm over routed tokens (REAP)", acts="weights"),
        "activation-norm": Entry("moe_prism.methods.prune.norm:ActivationNorm", "mean output norm over routed tokens (MAN)", acts="weights"),
        "easy-ep": Entry("moe_prism.methods.prune.norm:EasyEp", "routing weight x output norm x how far the layer turns the token", acts="weights"),
        "premoe": Entry("moe_prism.methods.prune.premoe:PreMoe", "how sure the router is of an expert where it is surest (PreMoE)", acts="weights"),
        "output-error": Entry("moe_prism.methods.prune.output_error:OutputError", "greedy removal by the layer's output error with tokens routed again", acts="weights"),
        "energy": Entry("moe_prism.methods.prune.norm:Energy", "sum of squared routing weight x output norm", acts="weights"),
        "mone": Entry("moe_prism.methods.prune.mone:Mone", "routing weight x spread of the outputs, with the mean output in the place of what goes (MoNE)", acts="weights"),
    },
    aliases={"plan": "layer-budgets", "linear": "whole-experts", "weight-level": "weight-cutoff"},
)  # fmt: skip


class Home(NamedTuple):
    """Where a registry is, and where its names are used."""

    package: str
    attribute: str
    used: str


REGISTRIES = {
    "solvers": Home("partition", "solvers", "`refactor --solver`: how the neurons of an expert are dealt to its sub-experts"),
    "objectives": Home("partition", "objectives", "`refactor --objective`: what a solver keeps together"),
    "gates": Home("partition", "gates", "`refactor --gate-choice`: which neurons of a sub-expert are its gate neurons"),
    "scorers": Home("elastic.scorers", "scorers", "`scorer` of an operating point: how the output norm of a slot is estimated"),
    "compensators": Home("elastic.compensate", "compensators", "`refactor --compensate`: what makes up for dropped sub-experts"),
    "recoveries": Home("recover", "methods", "`recover --method`: what wins quality back below full budget"),
    "collectors": Home("calibrate", "collectors", "`calibrate --collectors`: what one pass over calibration text measures"),
    "policies": Home("schedule", "policies", "`serve --policy`: who runs next, and at which quality level"),
    "routing-stages": Home(
        "routing", "routing_stages", "`routing` of an operating point: what routing methods fit and a layer runs"
    ),
    "architectures": Home(
        "architectures", "architectures", "`architecture` of a recipe of `train`: how experts are chosen and trained"
    ),
    "splits": Home("methods.split", "splits", "`split --method`: which neurons of a dense layer become which expert"),
    "slices": Home("frontier.judge", "slices", "`frontier --judge`: what held-out text is asked beside perplexity"),
    "protections": Home("compress.prune", "protections", "`prune --protect`: experts that stay whatever a criterion says"),
    "codecs": Home(
        "compress.codec", "codecs", "`weights` and `slots` of an operating point: how experts are stored in fewer bits"
    ),
    "source-formats": Home("checkpoint.formats", "source_formats", "sources of any command: how quantized weights are stored"),
    "cache-policies": Home(
        "offload", "cache_policies", "`generate --expert-policy` and `offload fit`: who leaves when an expert needs room"
    ),
    "placements": Home("placement", "placements", "`place --policy`: which device holds which expert"),
    "choosers": Home("pool", "choosers", "`chooser` of the pool of `route`: which model answers a question"),
    "predictors": Home(
        "offload", "predictors", "`generate --expert-predictor` and `offload fit`: which experts the next layer will want"
    ),
}
"""Kind, as `moe-prism ls` takes it -> where it is."""


def registry(kind: str) -> Registry[Any]:
    """The registry of a kind of REGISTRIES."""
    home = REGISTRIES[kind]
    found: Registry[Any] = getattr(import_module(f"moe_prism.{home.package}"), home.attribute)
    return found
