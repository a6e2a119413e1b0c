"""The options of ``preprocess.py``, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from pipeline.options import Section, option, parse_explicit_options
from pipeline.prepare.executors import ExecutionOptions
from pipeline.prepare.options import BuildOptions, ShardOptions
from pipeline.prepare.places import Places
from pipeline.prepare.pseudonyms import Pseudonyms
from pipeline.prepare.reference import ReferenceDataSet, ReferenceOptions
from pipeline.prepare.rules import Rules
from pipeline.prepare.sources.auto import Format, open_source
from pipeline.prepare.sources.layout import ColumnOptions, TableOptions
from pipeline.prepare.sources.meds import MedsOptions
from pipeline.prepare.sources.source import SideFileOptions, Source
from pipeline.prepare.sources.synthetic import SyntheticOptions
from pipeline.prepare.splits import SplitRule
from pipeline.schema import UserError


@dataclass(frozen=True, kw_only=True)
class CommandOptions(Section):
    """Input and output."""

    input: str = option(
        MISSING,
        "File, folder or pattern of event tables, URL of a file or folder, or the word synthetic.",
        metavar="INPUT",
    )
    output: str = option(MISSING, "New or empty folder for the data set, or its URL (s3://…).", metavar="DIR")
    work_dir: Path | None = option(None, "New folder on this machine for the work, where INPUT or DIR is a URL.")
    format: Format = option("auto", "Format of INPUT; auto detects it.")
    pseudonymize: Path | None = option(None, "Replace patients' ids by hashes keyed with this file.")
    overwrite: bool = option(False, "Replace an existing data set in DIR, and nothing else there.")
    dry_run: bool = option(False, "Read a sample of INPUT, say what would be done, and write nothing.")
    verbose: bool = option(False, "Print the whole summary.")


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """All options of the command; sections are declared beside the code that uses them."""

    command: CommandOptions
    shards: ShardOptions
    execution: ExecutionOptions
    reference: ReferenceOptions
    split: SplitRule
    rules: Rules
    side_files: SideFileOptions
    columns: ColumnOptions
    meds: MedsOptions
    table: TableOptions
    synthetic: SyntheticOptions


def parse_command(arguments: Sequence[str] | None) -> tuple[PreprocessOptions, frozenset[str]]:
    """Return the options of a command line, and the names of those that were set; raise UserError for a bad one."""
    text = "Prepare event tables as length-sorted shards, with statistics of the train split alone."
    return parse_explicit_options(
        PreprocessOptions, arguments, prog="preprocess.py", description=text, positional="input"
    )


def resolve_options(
    options: PreprocessOptions, explicit: frozenset[str], places: Places
) -> tuple[Source, BuildOptions]:
    """Return the source and what else decides the output; ``explicit`` names the options that were set.

    Options that contradict each other, the input or the data set of ``--like`` are a UserError.
    """

    def pick_explicit(*sections: object) -> dict[str, Any]:
        values = [item for section in sections for item in vars(section).items()]
        return {name: value for name, value in values if name in explicit}

    command, like = options.command, options.reference.like
    of_source = pick_explicit(options.side_files, options.columns, options.meds, options.table, options.synthetic)
    source = open_source(places.input, command.format, of_source)
    if places.output.resolve().is_relative_to(places.input.resolve()):
        raise UserError(f"--output {command.output}: lies in the input; name a folder outside of {command.input}")
    shards = {**vars(options.shards), "pseudonyms": command.pseudonymize and Pseudonyms.read(command.pseudonymize)}
    if like is None:
        if "outlier_action" in explicit and "outlier_std" not in explicit:
            raise UserError("--outlier_action: has no effect without --outlier_std; give both")
        return source, BuildOptions(split_rule=options.split, rules=options.rules, **shards)
    for name in ("splits", "split_fractions", "split_seed", "embeddings"):
        if name in explicit:
            raise UserError(f"--{name}: not used with --like; leave it out")
    reference = ReferenceDataSet.open(like)
    if reference.manifest.options.get("pseudonym_key") and not command.pseudonymize:
        raise UserError(f"--like {like}: has pseudonyms for patients; give --pseudonymize too")
    rules = reference.rules(pick_explicit(options.rules))
    split_rule = SplitRule.all_in(options.reference.like_split)
    source = reference.adapt_source(source, of_source)
    return source, BuildOptions(split_rule=split_rule, rules=rules, reference=reference, **shards)
