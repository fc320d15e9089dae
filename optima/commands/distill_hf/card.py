"""The model card of a student: what, from what, how, with which scores, by which command."""

from optima.commands.distill_hf.config import DistillHfConfig
from optima.runs.rows import Summary


def model_card(config: DistillHfConfig, summary: Summary) -> str:
    """Markdown with the front matter that the Hub reads."""
    scores = summary.scores
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{found[name]:.4f}" for found in scores.values()) + " |"
        for name in scores["after"]
    )
    engine, objective = config.engine, config.engine.objective
    sizes = {model: f"{count / 1e6:.2f} M" for model, count in summary.parameters.items()}
    return f"""---
library_name: transformers
base_model: {config.teacher}
tags: [distillation, optima]
---

# {config.run.name}

Distilled layer by layer with OPTIMA from `{config.teacher}` into `{config.student}`, on the rows of
`{config.data.name}`. {sizes["student"]} parameters, the teacher {sizes["teacher"]}.

How: {engine.rounds} rounds of {engine.steps_per_round} steps of {config.batch_size} rows. What was distilled beside the
predictions in each round was for the policy {engine.bandit.policy} to say. Weights, with balance {engine.balance}:
task {objective.task:g}, predictions {objective.logits:g}, hidden states {objective.hidden:g}, attention maps
{objective.attention:g}.

## Losses on {summary.test_items} held-out rows

| loss | {" | ".join(scores)} |
|---|{"---|" * len(scores)}
{rows}

## Command

```
{summary.command}
```
"""
