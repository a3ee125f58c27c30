"""Helpers to write tests of schedules as tables, with one row per boundary."""

import itertools
from dataclasses import replace

from hpc_absa.records import Eigenvalue, Observation
from hpc_absa.schedules import TrainSettings


def estimate(value, converged=True):
    return Eigenvalue(value, 1e-3 if converged else 0.5, 10, 512, 0.1, converged)


def unconverged(value):
    return estimate(value, converged=False)


def at(epoch, eigenvalue=None, decision_point=True):
    """A boundary; a bare number is a converged eigenvalue."""
    if isinstance(eigenvalue, int | float):
        eigenvalue = estimate(float(eigenvalue))
    return Observation(epoch, decision_point, eigenvalue)


def bound(schedule, **settings):
    """The rule for a run with these training settings, at a learning rate of 0.1."""
    defaults = {"epochs": 10**6, "microbatch": 1, "lr": 0.1, "lr_decay": 0.1}
    return schedule.bind(TrainSettings(**defaults | settings))


def follow(rule, observations, state=None, steps=()):
    """The decisions of `rule`; `steps` has the gradient squares of the steps before each."""
    state = state or rule.initial()
    decisions = []
    for seen, measured in itertools.zip_longest(observations, steps, fillvalue=()):
        for squares in measured:
            if rule.wants_gradients(state):
                state = rule.learn(state, squares)
        if seen.decision_point and not rule.wants_eigenvalue(state):
            seen = replace(seen, eigenvalue=None)
        decision = rule.decide(state, seen)
        assert decision.reason
        assert (decision.action == "grow") == (decision.state.global_batch > state.global_batch)
        decisions.append(decision)
        state = decision.state
    return decisions


def batches(decisions):
    return [decision.state.global_batch for decision in decisions]


def lrs(decisions):
    return [decision.state.lr for decision in decisions]


def actions(decisions):
    return "".join(decision.action[0] for decision in decisions)
