"""Schedules written as tables: one row a boundary."""

import itertools
from dataclasses import replace

from hpc_absa.records import Eigenvalue, Observation


def found(value, converged=True):
    """An estimate as the probe hands it over."""
    return Eigenvalue(value, 1e-3 if converged else 0.5, 10, 512, 0.1, converged)


def unconverged(value):
    return found(value, converged=False)


def at(epoch, eigenvalue=None, decision_point=True):
    """A boundary; a bare number is a converged eigenvalue."""
    if isinstance(eigenvalue, int | float):
        eigenvalue = found(float(eigenvalue))
    return Observation(epoch, decision_point, eigenvalue)


def follow(rule, observations, state=None, steps=()):
    """The decisions of `rule` along a course; `steps` has what it learns before each boundary."""
    state = state or rule.initial()
    decisions = []
    for seen, learnt in itertools.zip_longest(observations, steps, fillvalue=()):
        for squares in learnt:
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


def rates(decisions):
    return [decision.state.lr for decision in decisions]


def actions(decisions):
    return "".join(decision.action[0] for decision in decisions)
