"""A whole distillation step on a GPU: it never waits, and bandits choose there as they do on a CPU."""

from dataclasses import replace

import pytest
import torch
from whole_step import make_distiller, make_whole_step, random_batch

from optima_core import BanditConfig, DistillerConfig, ObjectiveConfig
from optima_core.bandit import POLICIES, make_policy
from optima_kernels.shared import selfcheck

CONFIGS = {
    "default": ObjectiveConfig(),
    "mse_jsd": ObjectiveConfig(attention_kind="mse", normalize=None, divergence="jsd"),
    "mean": ObjectiveConfig(attention_heads="mean"),
}


@pytest.mark.parametrize(("loss", "variant"), selfcheck.everything_usual())
def test_the_kernels_pass_their_self_check(loss: str, variant: str, device: torch.device) -> None:
    outcome = selfcheck.check_here(loss, variant, device)
    assert outcome.verdict == "right", outcome


@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_never_waits_for_the_device(config: str, device: torch.device, no_synchronisation) -> None:
    step = make_whole_step(DistillerConfig(objective=CONFIGS[config], ema=0.5), device)
    bandit, meter = step.bandit, step.meter
    batches = [random_batch(device) for _ in range(5)]
    for batch in batches[:2]:
        _, bandit, meter = step.run(batch, bandit, meter)
    with no_synchronisation():
        for batch in batches[2:]:
            loss, bandit, meter = step.run(batch, bandit, meter)
    assert torch.isfinite(loss)


def test_a_planted_wait_is_caught(device: torch.device, no_synchronisation) -> None:
    x = torch.ones((), device=device)
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


def test_a_step_on_the_gpu_is_that_on_the_cpu(device: torch.device) -> None:
    on_cpu, on_gpu = make_whole_step(DistillerConfig()), make_whole_step(DistillerConfig(), device)
    on_gpu.step.learner.load_state_dict(on_cpu.step.learner.state_dict())
    on_gpu.step.teacher_forward.model.load_state_dict(on_cpu.step.teacher_forward.model.state_dict())
    batch = random_batch()
    expected, *_ = on_cpu.run(batch, on_cpu.bandit, on_cpu.meter)
    actual, *_ = on_gpu.run(type(batch)(*(x.to(device) for x in batch)), on_gpu.bandit, on_gpu.meter)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_bandits_choose_as_on_the_cpu(policy: str, device: torch.device, seed: int) -> None:
    chooser = make_policy(policy, arms=5)
    states = [chooser.init(64, seed, place) for place in ("cpu", device)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        rewards = torch.rand(64, 5, generator=generator)
        arms = []
        for i, state in enumerate(states):
            arm, state = chooser.select(state)
            arms.append(arm.cpu())
            reward = rewards.gather(1, arms[-1].clamp(min=0)[:, None])[:, 0].to(arm.device)
            states[i] = chooser.update(state, arm, reward)
        assert torch.equal(arms[0], arms[1])


def test_one_compiled_graph_serves_every_arm(device: torch.device) -> None:
    config = DistillerConfig(rounds=7, steps_per_round=2, bandit=BanditConfig("round_robin", arms="subsets"))
    compiled, eager = make_distiller(device, replace(config, compile=True)), make_distiller(device, config)
    torch._dynamo.utils.counters.clear()
    for _ in range(7):
        ours, theirs = compiled.run_round(), eager.run_round()
        assert ours.modules == theirs.modules
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-2, abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_step_is_one_graph_in_inductor(device: torch.device) -> None:
    whole = make_whole_step(DistillerConfig(), device)
    losses, *_ = torch.compile(whole.forward, fullgraph=True)(random_batch(device), whole.bandit)
    assert torch.isfinite(whole.step.backward(losses))
