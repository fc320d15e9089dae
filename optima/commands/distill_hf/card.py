"""The model card of a student: what, from what, how, with which scores, by which command."""

from collections.abc import Mapping

from optima.commands.distill_hf.config import DistillHfConfig


def model_card(
    config: DistillHfConfig, command: str, scores: Mapping[str, Mapping[str, float]], parameters: str
) -> str:
    """Markdown with the front matter that the Hub reads. scores: held-out losses by model, then by name."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{found[name]:.4f}" if name in found else "" for found in scores.values()) + " |"
        for name in names
    )
    engine, objective = config.engine, config.engine.objective
    return f"""---
library_name: transformers
base_model: {config.teacher}
tags: [distillation, optima]
---

# {config.run.name}

Distilled layer by layer with OPTIMA from `{config.teacher}` into `{config.student}`, on the rows of
`{config.data.name}`.
{parameters}

How: {engine.rounds} rounds of {engine.steps_per_round} steps of {config.batch_size} rows; each round the policy
{engine.bandit.policy} chose what was distilled beside the predictions. Weights: task {objective.task:g}, predictions
{objective.logits:g}, hidden states {objective.hidden:g}, attention maps {objective.attention:g}.

## Losses on held-out rows

| loss | {" | ".join(scores)} |
|---|{"---|" * len(scores)}
{rows}

## Command

```
{command}
```
"""
