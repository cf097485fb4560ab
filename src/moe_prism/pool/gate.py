"""A softmax gate over experts that is fitted to the likelihood of their mixture: per question, or per token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Floats

STEPS = 200


@dataclass(frozen=True)
class Gate:
    """weights: [F + 1, A] of the features and a constant; A experts."""

    coefficients: Floats

    @classmethod
    def fit(cls, features: Floats, log_likelihood: Floats, ridge: float) -> Gate:
        """The gate that makes sum_t log sum_a w_a(x_t) p_a(t) largest, less ridge / 2 times the squared coefficients of the features.

        features: [T, F]; log_likelihood: [T, A] of what each expert says of t. Starts at the best gate without features, so that the
        mixture is at least as likely as the best single expert.
        """
        from scipy.optimize import minimize

        rows, experts = log_likelihood.shape
        inputs = np.hstack([features, np.ones((rows, 1))])
        likely = log_likelihood - log_likelihood.max(1, keepdims=True)
        start = np.zeros((inputs.shape[1], experts))
        start[-1] = np.log(_constant(np.exp(likely)))

        def loss(flat: Floats) -> tuple[float, Floats]:
            own = flat.reshape(start.shape)
            share = _log_softmax(inputs @ own)
            joint = share + likely
            total = np.logaddexp.reduce(joint, axis=1)
            slope = inputs.T @ (np.exp(share) - np.exp(joint - total[:, None])) / rows
            slope[:-1] += ridge * own[:-1]
            return float(-total.mean() + ridge / 2 * (own[:-1] ** 2).sum()), slope.ravel()

        found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
        return cls(np.asarray(found.x).reshape(start.shape))

    def weights(self, features: Floats) -> Floats:
        """[T, A], each row sums to 1."""
        return np.exp(_log_softmax(features @ self.coefficients[:-1] + self.coefficients[-1]))


def mixture(weights: Floats, log_likelihood: Floats) -> Floats:
    """[T] log of the mixture of experts: log sum_a w_a p_a. weights, log_likelihood: [T, A]."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp.reduce(np.log(weights) + log_likelihood, axis=1))


def _constant(likelihood: Floats) -> Floats:
    """[A] the most likely weights that are the same for all rows, by EM; kept off 0, where a gate could not leave."""
    share = np.full(likelihood.shape[1], 1 / likelihood.shape[1])
    for _ in range(STEPS):
        joint = share * likelihood
        share = (joint / joint.sum(1, keepdims=True)).mean(0)
    return np.asarray(np.clip(share, 1e-6, None))


def _log_softmax(scores: Floats) -> Floats:
    return np.asarray(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
