"""Random command lines, valid and spoilt: each trains its steps with a finite J, or is refused in one sentence."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import pydoc
import re
import shlex
import sys
import tempfile
import types
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import train
from configs.schema import Config
from configs.wording import shown
from tests.runs import ROOT, command, curve
from training.state import flat

CONFIGS = ROOT / "configs"
Draw = st.DrawFn


# ---- the choices and keys that there are, read from the configuration itself ----


@dataclass(frozen=True)
class Composed:
    """What a command line makes of the configuration."""

    choices: dict[str, str]  # group, as a command line writes it -> choice
    settings: dict[str, Any]  # key -> value


@functools.cache
def composed(*words: str) -> Composed:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("config", ["data=digits", *words], return_hydra_config=True)
    choices = {group: str(choice) for group, choice in config.hydra.runtime.choices.items()}
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return Composed(
        {group: choice for group, choice in choices.items() if not group.startswith("hydra")},
        flat(typing.cast(dict[str, Any], OmegaConf.to_container(plain, resolve=True))),
    )


def place(group: str) -> str:
    """The key of the section that a group fills: estimator.temperature for schedule@estimator.temperature."""
    return group.rpartition("@")[2].replace("/", ".")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group.partition("@")[0]).glob("*.yaml"))


def groups_within(outer: str, choice: str) -> list[str]:
    """The groups of the choice's own, such as estimator/baseline of estimator=score_function."""
    return sorted(g for g in composed(f"{outer}={choice}").choices if place(g).startswith(f"{outer}."))


def outer_groups() -> list[str]:
    """`experiment` is not drawn: a preset is a whole command, and test_bad_command_lines accepts each."""
    return sorted(group for group in composed().choices if "." not in place(group) and group != "experiment")


def allowed_texts(key: str, known: dict[str, Any]) -> list[str]:
    """The words that a key can have, by its type; none where it has no such type."""
    section, name = key.rpartition(".")[::2]
    owner: Any = Config
    if f"{section}._target_" in known:
        made = pydoc.locate(known[f"{section}._target_"])
        owner = made.__init__ if inspect.isclass(made) else made
    else:
        for part in section.split(".") if section else ():
            owner = typing.get_type_hints(owner)[part]
    try:
        annotation = typing.get_type_hints(owner).get(name)
    except NameError:  # some of PyTorch's annotations are for type checkers alone
        return []
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    return []


# ---- valid settings: tiny, whatever keys there are ----

# integers are numbers of things, of which a few do, except for these
INTEGERS: dict[str, st.SearchStrategy[int]] = {
    "seed": st.integers(0, 2**64 - 1),
    "data.split_seed": st.integers(0, 2**32),
    "data.num_labelled": st.sampled_from([10, 20, 50]),
    "data.num_validation": st.integers(1, 50),
    "objective.samples": st.sampled_from([1] * 9 + [2]),
    "objective.kl_warmup": st.sampled_from([0] * 9 + [2]),
    "objective.labels_first": st.sampled_from([0] * 9 + [1]),
    "model.classes": st.integers(2, 4),
    "evaluation.pixel_draws": st.sampled_from([1] * 9 + [2]),
    "estimator.num_samples": st.sampled_from([2, 2, 3, 4, 1]),
    "train.steps": st.just(2),
    "train.log_every": st.just(1),
    "evaluation.batch_size": st.sampled_from([100, 400]),  # few of them would take long: there are 360 test images
    "diagnostics.every": st.integers(0, 3),
    "diagnostics.draws": st.just(3),
}
A_FEW = st.integers(1, 4)
FEW_OF_A_SEED = 3


def valid_value(draw: Draw, key: str, value: Any, known: dict[str, Any]) -> Any:
    if isinstance(value, bool):
        return draw(st.booleans()) and (key != "cuda_graph" or draw(st.integers(0, 7)) == 0)  # needs a GPU
    if isinstance(value, int):
        return draw(INTEGERS.get(key, A_FEW))
    if isinstance(value, float):
        return value * draw(st.sampled_from([0.25, 0.5, 1.0]))
    if isinstance(value, list):
        return [valid_value(draw, key, item, known) for item in value]
    texts = allowed_texts(key, known) if isinstance(value, str) else []
    return draw(st.sampled_from(texts)) if texts else value


OF_LABELS = ("data.num_labelled=", "train.batch_size_labelled=", "evaluation.classify_by=", "objective", "prior=")


def has_labels(known: dict[str, Any]) -> bool:
    return bool(known["model._target_"].startswith(("models.networks.", "models.auxiliary.")))


# ---- spoilt ones ----

NUMBERS = ["-1", "0", "-0.0", "1", "7", "0.1", "1.5", "1e-308", "1e-30"]
NUMBERS += ["1e30", "1e308", "1e999", "-1e308", "-inf", "inf", "1_0"]
OTHER_TYPES = ["true", "null", "''", "[]", "[1,2]", "[nan,0.9]", "['a',null]", "[[1]]", "{}", "{a: 1}", "'1'", "'???'"]
TEXTS = st.text(st.sampled_from("ab1.,-+~=@/:[]{}()$'\"\\ \té\n"), max_size=6)
TARGETS = ["nope", "nope.Nope", "os", "os.getcwd", "builtins.dict", "torch.nn.Identity", "torch.nn.Linear"]
OPTIMIZERS = [
    f"torch.optim.{name}" for name in sorted(torch.optim.__all__) if inspect.isclass(getattr(torch.optim, name))
]
# Where a size decides how much memory or how many steps are used, a large one is a run that this machine cannot do or
# finish. It is drawn where it is only compared, or so large that allocating it fails at once on any machine.
FAILS_AT_ONCE = re.compile(r"(seed|every)$|^(model|data|lr_factor|estimator\.temperature)\.|^(eval|diag).*batch_size$")
ABSURD = [str(10**18), str(2**63), str(10**30)]


@dataclass(frozen=True)
class Word:
    """An argument that may spoil a command line, and `certainly` where no reading of it can be used."""

    text: str
    certainly: bool = False


def misspelt(draw: Draw, key: str) -> str:
    at = draw(st.integers(0, len(key) - 1))
    kind = draw(st.sampled_from(["left out", "doubled", "another"]))
    if key[at] in "._":
        kind = "another"
    middle = {"left out": "", "doubled": key[at] * 2, "another": "q"}[kind]
    return (key[:at] + middle + key[at + 1 :]) or "q"


@st.composite
def spoilt_value(draw: Draw, known: dict[str, Any]) -> Word:
    key = draw(st.sampled_from(sorted(known)))
    value = known[key]
    if key.endswith("_target_"):
        others = [known[other] for other in sorted(known) if other.endswith("_target_")]
        return Word(f"{key}={draw(st.sampled_from(TARGETS + others + OTHER_TYPES))}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and draw(st.booleans()):
        return Word(f"{key}={draw(st.sampled_from(['nan', 'much']))}", certainly=True)
    absurd = ABSURD if isinstance(value, int) and FAILS_AT_ONCE.search(key) else []
    return Word(f"{key}={draw(st.sampled_from(NUMBERS + OTHER_TYPES + absurd))}")


def sections_with_a_class(known: dict[str, Any]) -> list[str]:
    return sorted(key.rpartition(".")[0] for key in known if key.endswith("._target_"))


@st.composite
def another_class(draw: Draw, known: dict[str, Any]) -> tuple[Word, ...]:
    """A section's class is another one, which has its own defaults for all that the section said."""
    section = draw(st.sampled_from(sections_with_a_class(known)))
    classes = TARGETS + [known[f"{other}._target_"] for other in sections_with_a_class(known)]
    target = draw(st.sampled_from(OPTIMIZERS if section == "optimizer" else classes))
    rest = [key for key in known if key.startswith(f"{section}.") and "._" not in key]
    return Word(f"{section}._target_={target}"), *(Word(f"~{key}") for key in rest)


@st.composite
def more_settings(draw: Draw, known: dict[str, Any]) -> tuple[Word, ...]:
    """A setting that the section's class has and that no file names, such as optimizer.amsgrad."""
    section = draw(st.sampled_from(["optimizer", *sections_with_a_class(known)]))
    parameters = inspect.signature(typing.cast(Any, pydoc.locate(known[f"{section}._target_"]))).parameters
    others = sorted(name for name in parameters if f"{section}.{name}" not in known)
    value = draw(st.sampled_from(["true", *NUMBERS, *OTHER_TYPES]))
    words = [Word(f"+{section}.{draw(st.sampled_from(others or ['nope']))}={value}")]
    if f"{section}.fused" in known and draw(st.booleans()):  # which most of the others exclude
        words.append(Word(f"{section}.fused=false"))
    return tuple(words)


@st.composite
def spoilt_key(draw: Draw, known: dict[str, Any]) -> Word:
    key = draw(st.sampled_from(sorted(known)))
    value, wrong = shown(known[key]), misspelt(draw, key)
    certainly = wrong not in known
    words = [
        *(Word(f"{prefix}{wrong}={value}", certainly) for prefix in ("", "+", "++")),
        Word(f"~{wrong}", certainly),
        Word(f"+{key}={value}", certainly=True),
        Word(f"++{key}={value}"),
        Word(f"~{key}"),
        Word(f"~{key}={value}"),
        Word(f"~{key}=nope", certainly=True),
        Word(f"{key}.more=1", certainly=True),
        Word(f"+{key}.more=1", certainly=True),
    ]
    return draw(st.sampled_from(words))


@st.composite
def spoilt_group(draw: Draw, in_use: list[str]) -> Word:
    perhaps = ["estimator/baseline", "schedule@estimator.temperature", "experiment", "schedule", "nope"]
    group = draw(st.sampled_from([*in_use, *perhaps]))
    right = "digits" if group == "data" else draw(st.sampled_from(options(group) or ["nope"]))
    words = [
        Word(f"{group}=nope", certainly=True),
        *(Word(f"{group}={value}") for value in ("3", "[a,b]", "a/b", "../config", *OTHER_TYPES, right)),
        *(Word(f"{prefix}{group}={right}") for prefix in ("+", "++", "~")),
        Word(f"~{group}"),
        Word(f"{group}@nope={right}"),
        Word(f"{misspelt(draw, group)}={right}"),
    ]
    return draw(st.sampled_from(words))


@st.composite
def spoilt_section(draw: Draw, known: dict[str, Any]) -> Word:
    sections = {key.rpartition(".")[0] for key in known if "." in key}
    return Word(f"{draw(st.sampled_from(sorted(sections)))}={draw(st.sampled_from(OTHER_TYPES + NUMBERS + TARGETS))}")


@st.composite
def spoilt_syntax(draw: Draw, known: dict[str, Any]) -> Word:
    key, other = (draw(st.sampled_from(sorted(known))) for _ in range(2))
    words = [
        *(Word(text, certainly=True) for text in (key, f"{key}=[1,", f"{key}=a=b", f"{key}=1,2", "=3", "~", "+", "")),
        Word(f"{key}=${{nope}}", certainly=True),
        Word(f"{key}=${{{key}}}", certainly=True),
        *(Word(f"{key}={value}") for value in (f"${{{other}}}", "${now:}", "${oc.env:NOPE}", "${train}", "range(1,3)")),
        *(Word(f"{key}={value}") for value in ("glob(*)", "choice(1,2)", "int(2)", "str(1.5)", "sort(2,1)", "")),
    ]
    return draw(st.sampled_from(words))


@st.composite
def any_text(draw: Draw, known: dict[str, Any]) -> Word:
    return Word(f"{draw(st.sampled_from(sorted(known)))}={draw(TEXTS)}")


# ---- command lines ----


@st.composite
def command_lines(draw: Draw) -> tuple[Word, ...]:
    """A choice of every group, a tiny value of every integer, new values of some other keys; often, then, spoilt."""
    how_many = draw(st.sampled_from([0, 1, 0, 1, 0, 2]))
    words, in_use = [], outer_groups()
    known = dict(composed().settings)
    for outer in outer_groups():
        digits = outer == "data" and draw(st.integers(0, 19)) > 0  # the others are not there
        choice = "digits" if digits else draw(st.sampled_from(options(outer)))
        inner = groups_within(outer, choice) if outer != "data" else []
        in_use += inner
        own = [f"{outer}={choice}", *(f"{group}={draw(st.sampled_from(options(group)))}" for group in inner)]
        if outer != "data":
            of_choice = composed(*own).settings.items()
            known = {key: value for key, value in known.items() if not key.startswith(f"{outer}.")}
            known |= {key: value for key, value in of_choice if key.startswith(f"{outer}.")}
        words += own
    for key, value in known.items():
        is_size, is_special = type(value) is int, key.rpartition(".")[2].startswith("_")
        if is_size or (not is_special and draw(st.integers(0, 3)) == 0):
            new = valid_value(draw, key, value, known)
            if is_size or new != value:
                words.append(f"{key}={shown(new)}")
    if not has_labels(known) and draw(st.integers(0, 7)) > 0:  # what such a model asks for
        words = [word for word in words if not word.startswith(OF_LABELS)]
        words += ["objective=unsupervised", "data.num_labelled=0", "train.batch_size_labelled=0"]
    if any(word.startswith("likelihood=") and word[11:] not in ("auto", "bernoulli") for word in words):
        words.append("data.binarization=none")  # which the others are for
    one_word = [spoilt_value(known)] * 3
    one_word += [spoilt_key(known), spoilt_group(in_use), spoilt_section(known), spoilt_syntax(known), any_text(known)]
    several = [another_class(known), more_settings(known)]
    spoilt = st.one_of(*(strategy.map(lambda word: (word,)) for strategy in one_word), *several)
    spoilers = [word for _ in range(how_many) for word in draw(spoilt)]
    if how_many > 1:  # one may undo the other
        spoilers = [Word(word.text) for word in spoilers]
    return (*map(Word, words), *spoilers)


# ---- what must come of them ----


def outcome(words: tuple[Word, ...]) -> str:
    """Runs the command: `trained`, `refused` or `diverged`, as a usable but absurd learning rate or weight makes it."""
    certainly_bad = any(word.certainly for word in words)
    with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
        folder = Path(empty, "run")
        line = shlex.join([*(word.text for word in words), f"hydra.run.dir={folder}"])
        ended = command(train.main, line)
        assert "Traceback" not in ended.said, ended.said
        assert ended.code in (0, 2, 3), ended
        if ended.code == 0:
            assert not certainly_bad, "trained with what cannot be used"
            assert_trained(folder)
            return "trained"
        assert ended.err.startswith("catvae: "), ended.err
        assert ended.err.count("\n") == 1, ended.err
        if ended.code == 2:
            assert ended.out == ""
            assert not folder.exists(), "not refused before any work"
            return "refused"
        assert not certainly_bad, "trained with what cannot be used"
        assert re.fullmatch(r"catvae: \w.* is (nan|-?inf) at step \d+\n", ended.err), ended.err
        assert any(folder.glob("checkpoints/step_*.pt"))
        return "diverged"


def assert_trained(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    parts = ("val_", "test_") if result["config"]["evaluation.test"] else ("val_",)
    measured = {key: value for key, value in result.items() if key.startswith(parts)}
    if not result["config"]["model._target_"].startswith(("models.networks.", "models.auxiliary.")):
        measured = {
            key: value for key, value in measured.items() if not key.endswith(("accuracy", "calibration_error"))
        }
    assert all(math.isfinite(value) for value in measured.values()), result
    steps, every = result["config"]["train.steps"], result["config"]["train.log_every"]
    J = dict(curve(folder, "train/J"))
    assert sorted(J) == sorted({*range(every, steps + 1, every), steps})
    assert all(map(math.isfinite, J.values())), J


@pytest.fixture(autouse=True, scope="module")
def no_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine with no dataset but the digits, and without a way to download one."""

    def offline(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    torchvision, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    torchvision.datasets = datasets  # type: ignore[attr-defined]
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        setattr(datasets, name, offline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATVAE_DATA", str(tmp_path_factory.mktemp("no data")))
        patch.setitem(sys.modules, "torchvision", torchvision)
        patch.setitem(sys.modules, "torchvision.datasets", datasets)
        composed.cache_clear()
        yield
    torch.use_deterministic_algorithms(False)


def outcomes(how_many: int) -> Counter[str]:
    """How many of that many random command lines ended how, equal ones counted once; the same ones each time.

    Hypothesis makes an example from the last ones more often than not. A new seed after a few keeps them different,
    so that the counts say something of all lines. The first of a seed is always the same, the simplest.
    """
    seen: dict[str, str] = {}

    @settings(
        max_examples=FEW_OF_A_SEED,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(command_lines())
    def each(words: tuple[Word, ...]) -> None:
        line = shlex.join(word.text for word in words)
        note(f"train.py {line}")
        if line not in seen:
            seen[line] = outcome(words)

    for number in range(how_many // FEW_OF_A_SEED):
        seed(number)(each)()
    return Counter(seen.values())


def test_every_group_is_drawn() -> None:
    on_disk = {path.parent.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")} - {"."}
    inner = {group for outer in outer_groups() for choice in options(outer) for group in groups_within(outer, choice)}
    drawn = {group.partition("@")[0] for group in {*outer_groups(), *inner}}
    assert drawn == {group for group in on_disk if group.split("/")[0] not in ("hydra", "experiment")}


def test_any_configuration_trains_or_is_refused() -> None:
    ended = outcomes(75)
    assert ended.total() >= 40  # a third are the simplest line
    assert min(ended["trained"], ended["refused"]) >= 10, ended


@pytest.mark.slow
def test_any_of_2000_configurations_trains_or_is_refused() -> None:
    ended = outcomes(3200)
    assert ended.total() >= 2000
    assert min(ended["trained"], ended["refused"]) >= ended.total() / 4, ended
