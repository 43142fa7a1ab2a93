"""scikit-learn's methods that scripts.baselines puts beside ours, with their grids; validation accuracy chooses."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data.progress import progress
from data.splits import Indices

Pixels = npt.NDArray[np.float32]  # [N, D], in [0, 1]
Probabilities = npt.NDArray[np.floating[Any]]  # [N, K]
Settings = dict[str, Any]
Fitted = Any  # has predict(x) -> labels [N], and predict_proba(x) -> [N, K] where the method has probabilities

MOST_DENSE = 10_000  # training images with a kernel between all of them: 0.8 GB, and two copies while it is made


@dataclass(frozen=True)
class Known:
    """All that a method may see. Labels are int64 [N] in 0..K-1, and each class has some."""

    x: Pixels  # of all training images, in an order that does not tell the labelled ones
    y: Indices  # of all training images; -1 is scikit-learn's sign for an unlabelled one
    x_validation: Pixels
    y_validation: Indices

    @cached_property
    def x_labelled(self) -> Pixels:
        return self.x[self.y >= 0]

    @cached_property
    def y_labelled(self) -> Indices:
        return self.y[self.y >= 0]

    @cached_property
    def gamma_unit(self) -> float:
        """1 / (D * variance of a pixel), scikit-learn's gamma="scale": a width of kernel that fits any pixels."""
        return 1 / (self.x.shape[1] * (float(self.x.var()) or 1.0))


def grid(**values: Sequence[Any]) -> list[Settings]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


# what is tried; gamma in units of Known.gamma_unit (0.11 on digits, where 36 and 72 are 4 and 8)
GRIDS: dict[str, list[Settings]] = {
    "nearest_neighbour": grid(n_neighbors=[1]),
    "logistic_regression": grid(C=[0.1, 1, 10, 100]),
    "svm": grid(C=[1, 10, 100], gamma=[0.3, 1, 3]),
    "label_spreading": grid(kernel=["rbf"], gamma=[18, 36, 72, 144], alpha=[0.2, 0.9])
    + grid(kernel=["knn"], n_neighbors=[5, 7, 10, 20], alpha=[0.2, 0.9]),
    "self_training": grid(C=[1, 10], threshold=[0.75, 0.9]),
}


def nearest_neighbour(known: Known) -> Callable[[Settings], Fitted]:
    from sklearn.neighbors import KNeighborsClassifier

    return lambda settings: KNeighborsClassifier(**settings).fit(known.x_labelled, known.y_labelled)


def logistic_regression(known: Known) -> Callable[[Settings], Fitted]:
    from sklearn.linear_model import LogisticRegression

    return lambda settings: LogisticRegression(**settings, max_iter=1000).fit(known.x_labelled, known.y_labelled)


def svm(known: Known) -> Callable[[Settings], Fitted]:
    from sklearn.svm import SVC

    return lambda settings: SVC(**settings).fit(known.x_labelled, known.y_labelled)


def self_training(known: Known) -> Callable[[Settings], Fitted]:
    """Logistic regression that takes its own predictions for labels where it is sure of them, ten times over."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.semi_supervised import SelfTrainingClassifier

    def fit(settings: Settings) -> Fitted:
        inner = LogisticRegression(C=settings["C"], max_iter=100)
        return SelfTrainingClassifier(inner, threshold=settings["threshold"]).fit(known.x, known.y)

    return fit


def label_spreading(known: Known) -> Callable[[Settings], Fitted]:
    """Zhou et al. 2004. Unseen images take the labels of the training images near them."""
    from sklearn.semi_supervised import LabelSpreading

    neighbours = Neighbours(known.x, max(s.get("n_neighbors", 0) for s in GRIDS["label_spreading"]))

    def fit(settings: Settings) -> Fitted:
        if settings["kernel"] == "rbf":
            return LabelSpreading(**settings, max_iter=200).fit(known.x, known.y)
        k = settings["n_neighbors"]
        graph = neighbours.graph(known.x, k)
        spread = LabelSpreading(kernel=lambda x, y: graph, alpha=settings["alpha"], max_iter=200)
        return SpreadOverNeighbours(spread.fit(known.x, known.y), neighbours, k)

    return fit


@dataclass
class SpreadOverNeighbours:
    """The labels that were spread over a graph of `k` neighbours, as what predicts those of other images."""

    spread: Any  # a fitted LabelSpreading
    neighbours: Neighbours
    k: int

    def predict_proba(self, x: Pixels) -> Probabilities:
        near: Probabilities = self.neighbours.graph(x, self.k) @ self.spread.label_distributions_
        return near / near.sum(axis=1, keepdims=True)


class Neighbours:
    """The training images nearest to others, looked for once, however many graphs are made of them.

    LabelSpreading(kernel="knn") would look for them once for each of its settings: minutes with MNIST.
    """

    found: ClassVar[dict[bytes, Indices]] = {}  # by the images' digest: other labels of a split's images find them here

    def __init__(self, x: Pixels, most: int) -> None:
        self.x = x
        self.most = min(most, len(x))
        self.digest = hashlib.sha256(x.data).digest()

    def of(self, x: Pixels) -> Indices:
        """The `most` nearest training images of each image, [N, most], nearest first; one is its own nearest."""
        from sklearn.neighbors import NearestNeighbors

        key = self.digest + hashlib.sha256(x.data).digest()
        if key not in self.found:
            search = NearestNeighbors(n_neighbors=self.most, algorithm="brute").fit(self.x)
            blocks = progress(np.array_split(x, -(-len(x) // 1000)), "neighbours", "blocks")
            near = [search.kneighbors(block, return_distance=False) for block in blocks]
            self.found[key] = np.concatenate(near)
        return self.found[key]

    def graph(self, x: Pixels, k: int) -> Any:
        """1 where a training image is one of the `k` nearest, sparse [N, training images]."""
        from scipy.sparse import csr_matrix

        rows = self.of(x)[:, :k]
        starts = np.arange(0, rows.size + 1, rows.shape[1])
        return csr_matrix((np.ones(rows.size), rows.ravel(), starts), shape=(len(x), len(self.x)))


@dataclass(frozen=True)
class Method:
    title: str  # its name in scripts.compare
    target: str  # the class in scikit-learn
    prepare: Callable[[Known], Callable[[Settings], Fitted]]
    has_probabilities: bool = True


METHODS = {
    "nearest_neighbour": Method(
        "1-nearest neighbour", "sklearn.neighbors.KNeighborsClassifier", nearest_neighbour, has_probabilities=False
    ),
    "logistic_regression": Method(
        "logistic regression", "sklearn.linear_model.LogisticRegression", logistic_regression
    ),
    "svm": Method("SVM", "sklearn.svm.SVC", svm, has_probabilities=False),
    "label_spreading": Method("label spreading", "sklearn.semi_supervised.LabelSpreading", label_spreading),
    "self_training": Method("self-training", "sklearn.semi_supervised.SelfTrainingClassifier", self_training),
}


@dataclass(frozen=True)
class Chosen:
    """A method with the settings that are best on validation images, the first of equals."""

    method: Method
    settings: Settings
    fitted: Fitted
    tried: list[Settings]  # every setting, with its val_accuracy
    skipped: list[str]  # a sentence each

    def predict(self, x: Pixels) -> tuple[Indices, Probabilities | None]:
        return predict(self.method, self.fitted, x)


def choose(name: str, known: Known) -> Chosen:
    """Fits a method with all of its settings, each one seeing the labels of labelled images alone."""
    method = METHODS[name]
    settings, skipped = usable(name, known)
    for sentence in skipped:
        print(sentence, flush=True)
    fit = method.prepare(known)
    tried: list[Settings] = []
    best: tuple[Settings, Fitted] = ({}, None)
    for setting in progress(settings, method.title, "settings"):
        with warnings.catch_warnings():
            _be_quiet()
            fitted = fit(setting)
            labels, _ = predict(method, fitted, known.x_validation)
        accuracy = float((labels == known.y_validation).mean())
        if all(accuracy > before["val_accuracy"] for before in tried):
            best = setting, fitted
        tried.append({**setting, "val_accuracy": accuracy})
    return Chosen(method, *best, tried, skipped)


def _be_quiet() -> None:
    """What a setting that is not fitted to the end is worth is told by its validation accuracy."""
    from sklearn.exceptions import ConvergenceWarning

    warnings.simplefilter("ignore", ConvergenceWarning)
    warnings.filterwarnings("ignore", message="y contains no unlabeled samples")


def usable(name: str, known: Known) -> tuple[list[Settings], list[str]]:
    """The settings of a method's grid, gamma in numbers, and a sentence for what these data are too many or few for."""
    images = len(known.x)
    settings, skipped = [], []
    for setting in GRIDS[name]:
        if setting.get("kernel") == "rbf" and images > MOST_DENSE:
            said = f"{METHODS[name].title} without kernel=rbf: {images:,} x {images:,} take {8e-9 * images**2:.3g} GB"
        elif name == "label_spreading" and setting.get("n_neighbors", 0) > images:
            said = f"{METHODS[name].title} without n_neighbors={setting['n_neighbors']}: there are {images} images"
        else:
            gamma = {"gamma": float(f"{setting['gamma'] * known.gamma_unit:.2g}")} if "gamma" in setting else {}
            settings.append(setting | gamma)
            continue
        skipped += [said] if said not in skipped else []
    return settings, skipped


def predict(method: Method, fitted: Fitted, x: Pixels) -> tuple[Indices, Probabilities | None]:
    """Labels [N], and where the method has them the probabilities [N, K] that they come from."""
    if not method.has_probabilities:
        return fitted.predict(x), None
    with np.errstate(invalid="ignore"):  # 0 / 0
        q: Probabilities = fitted.predict_proba(x)
    q = np.where(np.isfinite(q).all(axis=1, keepdims=True), q, 1 / q.shape[1])  # no label has spread to its like
    return q.argmax(axis=1), q
