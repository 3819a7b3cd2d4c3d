"""Comparison files."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from lavis_uniadapter.common.schema.section import (
    LearningRates,
    Location,
    Section,
    Texts,
    option,
)


def named(split: str, metric: str) -> str:
    """The name of a split's metric in a comparison: that of ``test`` has no prefix."""
    return metric if split == "test" else f"{split}_{metric}"


class RunEntry(Section):
    """A line of the comparison, run once for each seed."""

    cfg_path: Location | None = option(None, "A recipe; null: the comparison's.")
    options: Texts = option((), "Options over the configuration, after those for all runs.")
    learning_rates: LearningRates | None = option(None, "To choose from; null: the comparison's.")
    learning_rate_of: str | None = option(None, "Take the learning rate of this run.")
    evaluate: bool = option(False, "Test only.")


Metrics = Annotated[Texts, Field(min_length=1)]
Seeds = Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
Entry = Annotated[RunEntry, BeforeValidator(lambda entry: {} if entry is None else entry)]


class PlanFile(Section):
    """A comparison file."""

    cfg_path: Location | None = option(None, "A recipe's name, or a file; for runs that give none.")
    output_dir: Location = option(..., "Folder of the results, relative to where the command runs.")
    metrics: Metrics = option(
        ...,
        "Metrics to report. For a split other than `test`, put its name first: `val_t2v_r1`. "
        "The first one is plotted.",
    )
    seeds: Seeds = option((42,), "Seeds of each run.")
    options: Texts = option((), "Options for every run, `section.key=value`.")
    learning_rates: LearningRates = option((), "Learning rates of the runs that name none.")
    tuning_seed: int = option(0, "Seed of the runs that choose a learning rate.")
    tuning_options: Texts = option((), "Options for the runs that choose a learning rate.")
    reference: str | None = option(None, "What others are compared with; null: the first trained.")
    base: RunEntry | None = option(None, "Trained first; the `model.pretrained` of all runs.")
    runs: Annotated[dict[str, Entry], Field(min_length=1)] = option(..., "The runs by name.")
