"""`resume=RUN_FOLDER`: the command line that goes on with a run where it stopped."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from configs.schema import ConfigError


def resume_arguments(arguments: list[str]) -> list[str]:
    """With resume=FOLDER among them, the run's own overrides, then these, then the folder to run in.

    Raises ConfigError if FOLDER is not a run folder.
    """
    resumed = [argument.removeprefix("resume=") for argument in arguments if argument.startswith("resume=")]
    if not resumed or resumed[-1] in ("", "null"):
        return arguments
    folder = Path(resumed[-1].strip("'\"")).expanduser().resolve()
    recorded = folder / ".hydra" / "overrides.yaml"
    if not recorded.is_file():
        raise ConfigError(f"resume must be a run folder, got {folder}: it has no .hydra/overrides.yaml")
    before = [str(override) for override in OmegaConf.load(recorded)]
    # output_subdir=null leaves .hydra as the first run wrote it
    return [*before, *arguments, f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]
