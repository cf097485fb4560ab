# ruff: noqa
# %% [markdown]
# # My own model in 15 minutes
#
# This page is a notebook in text form. VS Code and Jupyter (with jupytext) open it as one, and `python my_own_model.py` runs it too.
# You will cut the experts of a model into sub-experts, look at what every price costs on *your* text, and write down the price that
# you would take. `nano` is a small model that comes with the package. Give the folder of your model instead.

# %%
MODEL = "nano"  # a folder with config.json and safetensors, or a .gguf file
TEXT = "stdlib"  # a file, a folder or rows of what you will use the model for; "stdlib" is Python source
TOKENS = 16_384  # of calibration, and of evaluation; more is better and slower
LENGTH = 512  # tokens per window

# %%
import moe_prism

# %% [markdown]
# ## 1. What is in it (a second)
#
# Headers are read, not weights. `sub_experts` says into how many parts an expert can be cut.

# %%
facts = moe_prism.inspect_model(MODEL)
facts["architecture"], facts["experts_per_token"], facts["sub_experts"]

# %%
facts  # in a notebook: a table of the layers

# %% [markdown]
# ## 2. Will it fit (a second)
#
# `rehearse` checks everything that a job would check, and says how much memory and disk it needs. Nothing is done yet.

# %%
calibration = moe_prism.CalibrateOptions(text=TEXT, tokens=TOKENS, length=LENGTH)
options = moe_prism.RefactorOptions(calibration=calibration)
moe_prism.rehearse(moe_prism.refactor, MODEL, "elastic", options, force=True)

# %% [markdown]
# ## 3. Cut the experts (some minutes)
#
# The folder `elastic` holds the same weights in another order, and beside them what makes them elastic. The function of the model is
# the same.

# %%
done = moe_prism.refactor(MODEL, "elastic", options, force=True)
done  # a row per layer

# %%
assert done.to_json()["starved_experts"] < 0.2 * sum(row["experts"] for row in facts["layers"]), "give more or other text"

# %% [markdown]
# ## 4. What every price costs (some minutes)
#
# A *point* is one way to run the model. `kl` is its distance to the full model in nats per token, `top1_agreement` the share of
# tokens for which both name the same next token, and `active_expert_bytes` what a token reads. The evaluation text is the other side
# of your text: the model was not calibrated on it.

# %%
frontier = moe_prism.measure_frontier(
    "elastic", moe_prism.FrontierOptions(rules=("threshold",), text=TEXT, tokens=TOKENS, length=LENGTH, calibration_tokens=TOKENS)
)
frontier = moe_prism.time_frontier("elastic", frontier, moe_prism.Timing(text=TEXT, seconds=20))
frontier

# %% [markdown]
# The same as a chart, in `elastic/report.html`:

# %%
moe_prism.keep_frontier(frontier, "elastic")

# %% [markdown]
# ## 5. Choose
#
# Say how often the cheaper model may name another token than the full one. This is the cheapest point that keeps it.

# %%
AGREEMENT = 0.9
enough = [point for point in frontier.points if point.top1_agreement >= AGREEMENT]
best = min(enough, key=lambda point: point.active_expert_bytes)
full = max(frontier.points, key=lambda point: point.active_expert_bytes)
saved = 1 - best.active_expert_bytes / full.active_expert_bytes
best.name, best.budget, f"{saved:.0%} of the expert bytes saved"

# %% [markdown]
# ## 6. Read what it writes

# %%
model, tokenizer = moe_prism.load("elastic")
for point in (full, best):
    made = moe_prism.generate(model, tokenizer, "import os\n\ndef main(", point=point.point)
    print(f"--- {point.name}: {made.tokens_per_s:.0f} tokens/s\n{made.text}")

# %% [markdown]
# ## 7. Serve it
#
# `moe-prism serve elastic` serves all points at once, and every request says which quality it needs. [Serve a
# model](../how-to/serve.md) goes on from here. If nothing is saved at the agreement that you want, the log of your text is short, or
# the model needs all of its experts: try more calibration text first, then [skipping](../how-to/skip-experts.md).
