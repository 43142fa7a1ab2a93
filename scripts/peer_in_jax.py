"""M2 as a JAX user writes it, for scripts.benchmark to compare with: jitted whole, from rows to the update of Adam."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import optax

from configs.schema import Binarization
from models.m2.model import Networks
from models.networks import MLPClassifier
from training.run import Run

Parameters = dict[str, dict[str, Any]]


def dense(key: Any, inputs: int, outputs: int) -> dict[str, Any]:
    """A linear layer, initialised as PyTorch's weights are."""
    limit = inputs**-0.5
    return {
        "weight": jax.random.uniform(key, (inputs, outputs), minval=-limit, maxval=limit),
        "bias": jnp.zeros(outputs),
    }


def linear(layer: dict[str, Any], x: Any) -> Any:
    return x @ layer["weight"] + layer["bias"]


def jax_step(run: Run, networks: Networks, sampled: bool) -> Callable[[], object]:
    """J of M2 with networks of the run's sizes (model=mlp) and one update of Adam, as one jitted function.

    Rows, pixels where they are binarized dynamically, dropout, noise and classes are drawn inside it; y is enumerated,
    or relaxed at temperature 0.5. Float32, on JAX's first device. A step returns -J.
    """
    assert isinstance(networks.classifier, MLPClassifier)
    (hidden, pixels), keep = networks.classifier.hidden.weight.shape, 1 - networks.classifier.dropout.probability
    classes, size, weights, settings = networks.num_classes, networks.latent_size, run.weights, run.config.train
    draws_pixels = run.config.data.binarization == Binarization.dynamic
    labelled, unlabelled = settings.batch_size_labelled, settings.batch_size_unlabelled
    x_labelled, x_unlabelled = (
        jnp.asarray(x[:].flatten(1).cpu().numpy()) for x in (run.batches.data.x_labelled, run.batches.data.x_unlabelled)
    )
    y_labelled = jnp.asarray(run.batches.data.y_labelled.cpu().numpy())

    def initial(key: Any) -> Parameters:
        keys = jax.random.split(key, 6)
        sizes = {
            "classifier_hidden": (pixels, hidden),
            "classifier_logits": (hidden, classes),
            "inference_hidden": (pixels + classes, hidden),
            "inference_z": (hidden, 2 * size),
            "generator_hidden": (size + classes, hidden),
            "generator_pixels": (hidden, pixels),
        }
        return {name: dense(key, *of) for key, (name, of) in zip(keys, sizes.items(), strict=True)}

    def log_q(p: Parameters, x: Any, key: Any) -> Any:
        features = jax.nn.relu(linear(p["classifier_hidden"], x))
        if keep < 1:
            features = features * jax.random.bernoulli(key, keep, features.shape) / keep
        return jax.nn.log_softmax(linear(p["classifier_logits"], features))

    def bound(p: Parameters, x: Any, y: Any, noise: Any) -> Any:
        features = jax.nn.relu(linear(p["inference_hidden"], jnp.concatenate([x, y], axis=-1)))
        loc, raw_scale = jnp.split(linear(p["inference_z"], features), 2, axis=-1)
        scale = jax.nn.softplus(raw_scale) + 1e-4
        features = jnp.concatenate([loc + scale * noise, y], axis=-1)
        logits = linear(p["generator_pixels"], jax.nn.relu(linear(p["generator_hidden"], features)))
        kl = 0.5 * (loc**2 + scale**2 - 1 - 2 * jnp.log(scale)).sum(axis=-1)
        return (x * logits - jax.nn.softplus(logits)).sum(axis=-1) - kl

    def loss(p: Parameters, key: Any, x: Any, y: Any) -> Any:
        keys = jax.random.split(key, 4)
        log_probabilities = log_q(p, x, keys[0])
        known, log_q_u = log_probabilities[:labelled], log_probabilities[labelled:]
        q, noise = jnp.exp(log_q_u), jax.random.normal(keys[1], (len(x), size))
        x_u, noise_u = x[labelled:], noise[labelled:]
        if sampled:
            relaxed = jax.nn.softmax((log_q_u + jax.random.gumbel(keys[2], log_q_u.shape)) / 0.5)
            expected = bound(p, x_u, relaxed, noise_u)
        else:
            everywhere = jax.vmap(lambda one: bound(p, x_u, jnp.broadcast_to(one, q.shape), noise_u))
            expected = (q.T * everywhere(jnp.eye(classes))).sum(axis=0)
        kl = (q * log_q_u).sum(axis=-1) + jnp.log(classes)
        l_bound = bound(p, x[:labelled], y, noise[:labelled]).mean() - jnp.log(classes)
        classification = (known * y).sum(axis=-1).mean()
        j = weights.labelled * l_bound + weights.unlabelled * (expected - kl).mean() + weights.alpha * classification
        return -j

    optimizer = optax.adam(1e-3)

    def update(p: Parameters, state: Any, key: Any, x_l: Any, y_l: Any, x_u: Any) -> tuple[Parameters, Any, Any]:
        keys = jax.random.split(key, 4)
        rows_l = jax.random.randint(keys[0], (labelled,), 0, len(x_l))
        rows_u = jax.random.randint(keys[1], (unlabelled,), 0, len(x_u))
        x = jnp.concatenate([x_l[rows_l], x_u[rows_u]]).astype(jnp.float32) / 255
        if draws_pixels:
            x = jax.random.bernoulli(keys[2], x).astype(jnp.float32)
        value, gradients = jax.value_and_grad(loss)(p, keys[3], x, y_l[rows_l])
        updates, state = optimizer.update(gradients, state, p)
        return optax.apply_updates(p, updates), state, value

    jitted = jax.jit(update, donate_argnums=(0, 1))
    parameters = initial(jax.random.key(0))
    state, steps = optimizer.init(parameters), count(1)

    def step() -> Any:
        nonlocal parameters, state
        key = jax.random.key(next(steps))
        parameters, state, value = jitted(parameters, state, key, x_labelled, y_labelled, x_unlabelled)
        return jax.block_until_ready(value)

    return step
