"""Comparison files."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from lavis_uniadapter.common.schema.section import Numbers, Section, Text, Texts, Wanted, option

Options = Annotated[Texts, Wanted("a list of section.key=value")]


class RunEntry(Section):
    """A line of the comparison, run once for each seed."""

    cfg_path: Text | None = option(None, "Relative to this file; null: the comparison's.")
    options: Options = option((), "Options over the configuration, after those for all runs.")
    learning_rates: Numbers | None = option(None, "To choose from; null: the comparison's.")
    learning_rate_of: str | None = option(None, "Take the learning rate of this run.")
    evaluate: bool = option(False, "Test only.")


class PlanFile(Section):
    """A comparison file."""

    cfg_path: Text | None = option(None, "For runs that name none; relative to this file.")
    output_dir: Text = option(..., "Folder of the results, relative to where the command runs.")
    metrics: Annotated[Texts, Field(min_length=1), Wanted("a list of names")] = option(
        ..., "Metrics of the test split; the first is plotted."
    )
    seeds: Annotated[
        tuple[int, ...], Field(strict=False, min_length=1), Wanted("a list of whole numbers")
    ] = option((42,), "Seeds of each run.")
    options: Options = option((), "Options for every run.")
    learning_rates: Numbers = option((), "Learning rates of the runs that name none.")
    tuning_seed: int = option(0, "Seed of the runs that choose a learning rate.")
    tuning_options: Options = option((), "Options for the runs that choose a learning rate.")
    reference: str | None = option(None, "What others are compared with; null: the first trained.")
    base: RunEntry | None = option(None, "Trained first; the `model.pretrained` of all runs.")
    runs: Annotated[
        dict[str, RunEntry], Field(min_length=1), Wanted("a section of at least one run")
    ] = option(..., "The runs by name.")

    @field_validator("runs", mode="before")
    @classmethod
    def _allow_empty_runs(cls, runs: Any) -> Any:
        if not isinstance(runs, dict):
            return runs
        return {name: {} if entry is None else entry for name, entry in runs.items()}
