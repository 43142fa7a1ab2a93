"""What a run is called in TensorBoard, its row among the hyper-parameters, and what its log-likelihood is called."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from training.state import FREE_TO_CHANGE

SEEDS = ("data.split_seed", "seed")  # no quantities
# what people compare, whether or not this run's command line says it
COMPARED = ("data.num_labelled", "objective.alpha", "optimizer.lr", "train.steps", *SEEDS)
CHOSEN = ("estimator", "data", "model")
LONGEST = 120  # bytes of a name; some encrypted file systems take 143


def run_name(asked: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The estimator and what was overridden, as a folder's name: "ESTIMATOR, split_seed=3, lr=0.001".

    What varies in a sweep comes first; sections are left out where no two keys are the same without; a name that would
    be too long ends in the number of those that are left out. From `asked`, a run's record of its command line, and
    its flat configuration.
    """
    said = {key: value for key, value in _overridden(asked, config).items() if key not in _unsaid()}
    said.pop("estimator", None)
    short = Counter(_short(key) for key in said)
    parts = [f"{_short(key) if short[_short(key)] == 1 else key}={_words(value)}" for key, value in said.items()]
    name = _as_file_name(_chosen("estimator", asked, config)).encode()[: LONGEST // 2].decode(errors="ignore")
    for place, part in enumerate(map(_as_file_name, parts)):
        rest = len(parts) - place
        if len(f"{name}, {part}, {rest} more".encode()) > LONGEST:
            return f"{name}, {rest} more"
        name = f"{name}, {part}"
    return name


def hyper_parameters(asked: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float | str]:
    """What was overridden, and what people compare in any case; numbers, and all else in words.

    TensorBoard shows first in what its runs differ, which a run cannot know. But two runs differ only in what the
    command line of one of them says; the other has an empty cell for it, unless it is what people compare.
    """
    found = {key: _chosen(key, asked, config) for key in CHOSEN}
    found |= {key: config[key] for key in COMPARED if key in config}
    found |= {key: value for key, value in _overridden(asked, config).items() if key not in _unsaid()}
    return {key: value if _is_number(value) and key not in SEEDS else _words(value) for key, value in found.items()}


def _unsaid() -> set[str]:
    """Keys of which a run's result does not depend, or only on what they lead to."""
    return FREE_TO_CHANGE - {"train.steps", "data.path"}


def _overridden(asked: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and groups of the command line with what they came to; what varies in a sweep first."""
    varied = list(map(str, asked.get("varied", [])))
    found = {}
    for override in [*varied, *(other for other in map(str, asked.get("overrides", [])) if other not in varied)]:
        group, _, text = override.lstrip("+~").partition("=")
        key = group.rpartition("@")[2].replace("/", ".")
        found[key] = config.get(key, asked.get("choices", {}).get(group) or text.strip("'\""))
        if key == "data.path":
            found[key] = re.split(r"[/\\]", str(found[key]).rstrip("/\\"))[-1]
    return found


def _chosen(group: str, asked: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The choice of a group; of runs without a record of theirs, what it came to."""
    choice = asked.get("choices", {}).get(group)
    return str(choice or config.get(f"{group}.name") or str(config.get(f"{group}._target_")).rpartition(".")[2])


def _short(key: str) -> str:
    return key.partition(".")[2] or key


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _words(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_words, value))}]"
    return str(value)


def _as_file_name(text: str) -> str:
    """Without what a file system, or its encoding, may refuse in a name, or TensorBoard's projector takes for its own.

    It puts names into addresses as they are, where a + is a blank.
    """
    encoding = sys.getfilesystemencoding()
    known = "".join(letter if letter.isprintable() else "_" for letter in text)
    known = known.encode(encoding, "replace").decode(encoding)
    return re.sub(r'[<>:"/\\|?*&#%;]', "_", known.replace("+", "")).rstrip(" .")


def log_likelihood_name(name: str, binarization: str, evidence: str = "log p(x)") -> str:
    """What `log_likelihood` estimates from below, under a likelihood and a treatment of pixels.

    `evidence` is a model's, log p(x) or log p(a part|another), with x for the whole image.
    """
    if name == "bernoulli" and binarization == "none":
        return f"E[{re.sub('[(][^|)]+', '(b', evidence)}], b drawn from the grey levels,"
    return evidence if name in ("bernoulli", "discretized_logistic") else f"the log-density {evidence}"
