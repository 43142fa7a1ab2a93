"""Networks of a person's own that do not fit are refused before work, in one sentence that says how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.check import built_model, check, typed
from configs.schema import ConfigError
from scripts.command import composed

MODELS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs" / "model").glob("*.yaml"))

MODULE = """
from dataclasses import replace

from torch import nn

from models.contract import Model
from models.contract import Networks as AnyNetworks
from models.networks import MLPClassifier, MLPGenerator, MLPInference, Networks


class Flat(nn.Module):
    def __init__(self, shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(shape.size, num_classes)

    def forward(self, x, generator=None):
        return self.layer(x)  # line 17: images are [B, C, H, W]


class KnowsNoGenerator(Flat):
    def forward(self, x):
        return self.layer(x.flatten(1))


class ForOneY(MLPGenerator):
    def forward(self, y, z):
        return super().forward(y, z)[0]


def mine(shape, num_classes, *, case: str = ""):
    classifier = MLPClassifier(shape, num_classes + (case == "classes"), 16, dropout=0.0)
    if case == "flatten":
        classifier = Flat(shape, num_classes)
    if case == "signature":
        classifier = KnowsNoGenerator(shape, num_classes)
    inference = MLPInference(shape, num_classes, 4 + (case == "latents"), 16, scale="softplus")
    make = ForOneY if case == "samples" else MLPGenerator
    generator = make(replace(shape, width=7) if case == "pixels" else shape, num_classes, 4, 16)
    return Networks(classifier, inference, generator, num_classes, 4)


class Unfinished(AnyNetworks):
    def __init__(self, shape, num_classes):
        pass

    def model(self, likelihood, prior):
        family = Model()
        family.latents, family.likelihood, family.log_prior = [(1, 3)], likelihood, None
        return family
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module of networks, of a name that no other test imports."""
    name = "networks_of_" + "".join(letter for letter in request.node.name if letter.isalpha())
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return f"{name}.mine"


def check_mine(target: str, *others: str) -> None:
    keys = ("latent_size", "hidden", "dropout", "scale", "rotation", "shift", "distortion")
    check(
        typed(composed("data=digits", "model=mlp", f"model._target_={target}", *(f"~model.{k}" for k in keys), *others))
    )


@pytest.mark.parametrize("model", MODELS)
def test_every_family_gives_the_shapes_that_it_says(model: str) -> None:
    built = built_model(typed(composed("data=digits", f"model={model}")))
    for name, value, wanted in built.shapes(torch.zeros(3, 1, 8, 8)):
        assert tuple(value.shape) == wanted, name


def test_networks_that_fit_are_taken(target: str) -> None:
    check_mine(target)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("classes", r"classifier's logits must be \[4, 10\] for 4 of them, got \[4, 11\]"),
        ("latents", r"inference's loc must be \[1, 4, 4\] for 4 of them, got \[1, 4, 5\]"),
        ("pixels", r"generator's outputs must be \[1, 4, 64\] for 4 of them, got \[1, 4, 56\]"),
        ("samples", r"generator's outputs must be \[1, 4, 64\] for 4 of them, got \[4, 64\]"),
        ("flatten", r"RuntimeError in \S+, line 17: "),
        ("signature", "KnowsNoGenerator.forward.. takes 2 positional arguments but 3 were given"),
    ],
)
def test_networks_that_do_not_fit_are_refused(target: str, case: str, sentence: str) -> None:
    must = rf"^model\._target_ must make networks for images \[1, 8, 8\], got {target}: .*"
    with pytest.raises(ConfigError, match=must + sentence):
        check_mine(target, f"+model.case={case}")


def test_a_family_that_lacks_a_part_is_refused(target: str) -> None:
    without_labels = ("objective=unsupervised", "data.num_labelled=0", "train.batch_size_labelled=0")
    with pytest.raises(ConfigError, match=r"Model must define posterior\(x\)"):
        check_mine(target.replace("mine", "Unfinished"), *without_labels, "estimator=marginalization")
