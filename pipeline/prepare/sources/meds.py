"""MEDS 0.4, the Medical Event Data Standard: ``data/**/*.parquet``, ``metadata/``, and label files of a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import polars as pl
import pyarrow.parquet as pq

from pipeline.prepare import names
from pipeline.prepare.sources.side_files import parse_labels, pick_column, read_frame, unique_labels
from pipeline.prepare.sources.source import (
    LABEL,
    SPLIT,
    SUBJECT,
    UNREADABLE,
    Origin,
    Piece,
    RawRows,
    Source,
    check_splits,
    file_pieces,
    number_rows,
    parquet_columns,
    plain_column,
    read_parquet,
    utc,
)
from pipeline.schema import MINUTE, PATIENT_ID, SPLITS, VALUE, VARIABLE, UserError

COLUMNS: Final = ("subject_id", "time", "code")
NUMERIC_VALUE: Final = "numeric_value"
PREDICTION_TIME: Final = "prediction_time"
LABEL_COLUMNS: Final = ("boolean_value",)

BIRTH: Final = r"^MEDS_BIRTH(//|$)"
EXCLUDE_CODES: Final = (r"^MEDS_DEATH(//|$)", r"(?i)(^|[/_ ])(death|died|deceased|discharge)([/_ ]|$)")
"""They give an outcome away, or stand for the end of what is to be predicted."""

SPLIT_MAP: Final = (("train", "train"), ("tuning", "valid"), ("held_out", "test"))


def is_meds(path: Path) -> bool:
    """Whether the folder holds a file below ``data`` with MEDS's columns."""
    first = min((path / "data").rglob("*.parquet"), default=None)
    try:
        return first is not None and set(COLUMNS) <= set(pq.read_schema(first).names)
    except UNREADABLE:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Meds(Source):
    """The folder that holds ``data`` and ``metadata``.

    A subject without samples in ``labels_file`` is one patient, named by its id.  A sample (a subject and a prediction
    time) is a patient of its own, ``<subject>@<prediction time>``: the subject's events until then, that time included.

    Attributes:
        labels_file: a file, or a folder of files, in the label schema.
        label_column: of the label; by default ``boolean_value``.
        labelled_only: leave subjects without samples out.
        origin_code: minutes count from its first event; else from the first event that is not birth.
        exclude_codes: regular expressions; events whose code one of them is found in are rejects.
        split_map: pairs of a name in ``subject_splits.parquet`` and a split.
    """

    events_decided_by: ClassVar[tuple[str, ...]] = ("origin_code", "exclude_codes")

    path: Path
    labels_file: Path | None = None
    label_column: str | None = None
    labelled_only: bool = False
    origin_code: str | None = None
    exclude_codes: tuple[str, ...] = EXCLUDE_CODES
    split_map: tuple[tuple[str, str], ...] = SPLIT_MAP
    embeddings_file: Path | None = None
    name: str = "meds"

    @property
    def options(self) -> dict[str, object]:
        names = ("label_column", "labelled_only", "origin_code", "exclude_codes")
        return {**{name: getattr(self, name) for name in names}, "split_map": dict(self.split_map)}

    @property
    def origin(self) -> Origin:
        return Origin(variable=self.origin_code, never=BIRTH)

    def _files(self) -> list[Path]:
        files = sorted((self.path / "data").rglob("*.parquet"))
        if not files:
            raise UserError(f"{self.path}: no data/**/*.parquet here; name the folder that holds data and metadata")
        return files

    def _metadata(self, name: str) -> Path | None:
        path = self.path / "metadata" / name
        return path if path.is_file() else None

    def _label_files(self) -> list[Path]:
        if self.labels_file is None or not self.labels_file.is_dir():
            return [] if self.labels_file is None else [self.labels_file]
        files = sorted(self.labels_file.rglob("*.parquet"))
        if not files:
            raise UserError(f"{self.labels_file}: no **/*.parquet here; name the label file, or the folder of a task")
        return files

    def inputs(self) -> list[Path]:
        beside = (self._metadata("subject_splits.parquet"), self._metadata("codes.parquet"), self.embeddings_file)
        return [*self._files(), *self._label_files(), *filter(None, beside)]

    def pieces(self) -> list[Piece]:
        self._is_excluded(pl.Series([""]))  # a wrong expression is found before the work
        return file_pieces([(path, path.relative_to(self.path).as_posix()) for path in self._files()])

    def read(self, piece: Piece) -> RawRows:
        frames = [self._read_file(piece, number) for number in range(len(piece.files))]
        codes = names.concat([frame[VARIABLE] for frame in frames])
        excluded = names.fits(codes, self._is_excluded).fill_null(False)
        rows = pl.concat([frame.drop(VARIABLE) for frame in frames], how="vertical_relaxed")
        rows = rows.with_columns(codes, excluded.alias("excluded"))
        rules = [("excluded_code", pl.col("excluded"))]
        num_rows = rows.height
        if self.labels_file is None:
            rows = rows.with_columns(pl.col(SUBJECT).alias(PATIENT_ID))
        else:
            rows = rows.join(self._samples(), on=SUBJECT, how="left", maintain_order="left")
            rows = rows.with_columns(pl.coalesce(PATIENT_ID, pl.col(SUBJECT).cast(pl.String)).alias(PATIENT_ID))
            rules.append(("after_prediction_time", pl.col(MINUTE) > pl.col(PREDICTION_TIME)))
            if self.labelled_only:
                rules.insert(0, ("no_sample", pl.col(PREDICTION_TIME).is_null() & pl.col(SUBJECT).is_not_null()))
        return RawRows(rows=rows, minute=pl.col(MINUTE), static=True, rules=tuple(rules), num_source_rows=num_rows)

    def _read_file(self, piece: Piece, number: int) -> pl.DataFrame:
        """``file``, ``row``, ``subject`` int64, ``minute`` (instants), ``variable``, ``value``."""
        path = self.path / piece.files[number]
        columns = parquet_columns(path)
        wanted = [pick_column(path, columns, name, (), "MEDS's names") for name in COLUMNS]
        wanted += [NUMERIC_VALUE] * (NUMERIC_VALUE in columns)
        frame, first = read_parquet(path, piece, wanted, of_names=("code",))
        no_value = pl.repeat(None, frame.height, dtype=pl.Float32, eager=True)
        value = frame.get_column(NUMERIC_VALUE, default=no_value)
        code = frame["code"]
        return number_rows(
            {
                SUBJECT: _subjects(path, frame),
                MINUTE: _instants(path, frame["time"]).rename(MINUTE),
                VARIABLE: code if isinstance(code.dtype, pl.Enum) else names.encode(plain_column(path, "code", code)),
                VALUE: _checked(path, value, value.dtype.is_numeric() or value.dtype == pl.Null).rename(VALUE),
            },
            file=number,
            first=first,
        )

    def _is_excluded(self, codes: pl.Series) -> pl.Series:
        """[N] bool, whether an expression of ``exclude_codes`` is found in a code."""
        found = pl.Series([False]).new_from_index(0, len(codes))
        for expression in self.exclude_codes:
            try:
                found |= codes.str.contains(expression).fill_null(False)
            except pl.exceptions.ComputeError as error:
                raise UserError(f"--exclude_codes {expression}: no regular expression ({error}); mend it") from None
        return found

    def _samples(self) -> pl.DataFrame:
        """``subject``, ``prediction_time``, ``patient_id``, ``label``: a row a sample."""
        assert self.labels_file is not None
        files = [self._read_samples(path) for path in self._label_files()]
        samples = pl.concat(files).with_columns(
            pl.format("{}@{}", SUBJECT, pl.col(PREDICTION_TIME).dt.to_string("%Y-%m-%dT%H:%M:%S%.f")).alias(PATIENT_ID)
        )
        labels = unique_labels(self.labels_file, samples[PATIENT_ID], samples[LABEL])
        return samples.drop(LABEL).unique().join(labels, on=PATIENT_ID).sort(SUBJECT, PREDICTION_TIME)

    def _read_samples(self, path: Path) -> pl.DataFrame:
        frame = read_frame(path)
        for name in ("subject_id", PREDICTION_TIME):
            pick_column(path, frame.columns, name, (), "MEDS's names")
            if frame[name].null_count():
                row = frame[name].is_null().arg_true()[0] + 1
                raise UserError(f"{path}: row {row} has no {name}; give one, or leave the row out")
        label = pick_column(path, frame.columns, self.label_column, LABEL_COLUMNS, "--label_column")
        subjects = _subjects(path, frame)
        return pl.DataFrame(
            {
                SUBJECT: subjects,
                PREDICTION_TIME: _instants(path, frame[PREDICTION_TIME]),
                LABEL: parse_labels(path, frame[label]),
            }
        )

    def labels(self) -> tuple[str, pl.DataFrame] | None:
        if self.labels_file is None:
            return None
        return str(self.labels_file), self._samples().select(PATIENT_ID, LABEL, pl.col(SUBJECT).cast(pl.String))

    def splits(self) -> pl.DataFrame | None:
        path = self._metadata("subject_splits.parquet")
        if path is None:
            return None
        frame = read_frame(path)
        for name in ("subject_id", SPLIT):
            pick_column(path, frame.columns, name, (), "MEDS's names")
        known = dict(self.split_map)
        strange = (~frame[SPLIT].is_in(list(known)).fill_null(False)).arg_true()
        if len(strange):
            raise UserError(
                f"{path}: row {strange[0] + 1} has split {frame[SPLIT][strange[0]]!r}, not one of "
                f"{', '.join(known)}; say which is which: --split_map NAME=train,OTHER=test"
            )
        subjects = _subjects(path, frame)
        splits = frame[SPLIT].replace_strict(known)
        given = {split: subjects.filter(splits == split).cast(pl.String).to_list() for split in SPLITS}
        of_subjects = check_splits(given, path)
        if self.labels_file is None:
            return of_subjects
        samples = self._samples().select(PATIENT_ID, pl.col(SUBJECT).cast(pl.String))
        of_samples = samples.join(of_subjects, left_on=SUBJECT, right_on=PATIENT_ID).select(PATIENT_ID, SPLIT)
        return pl.concat([of_subjects, of_samples])

    def embeddings(self) -> Path | None:
        return self.embeddings_file

    def descriptions(self) -> dict[str, str]:
        """A code's descriptions, each once, in the order of ``codes.parquet``."""
        path = self._metadata("codes.parquet")
        if path is None:
            return {}
        frame = read_frame(path)
        pick_column(path, frame.columns, "code", (), "MEDS's names")
        if "description" not in frame.columns:
            return {}
        text = frame.select(pl.col("code", "description").cast(pl.String).str.strip_chars()).drop_nulls()
        text = text.filter(pl.col("description") != "").unique(maintain_order=True)
        return dict(text.group_by("code").agg(pl.col("description").str.join("; ")).iter_rows())


def _subjects(path: Path, frame: pl.DataFrame) -> pl.Series:
    column = frame["subject_id"]
    return _checked(path, column, column.dtype.is_integer()).cast(pl.Int64).rename(SUBJECT)


def _instants(path: Path, column: pl.Series) -> pl.Series:
    return utc(_checked(path, column, isinstance(column.dtype, pl.Datetime | pl.Date | pl.Null)))


def _checked(path: Path, column: pl.Series, fits: bool) -> pl.Series:
    if not fits:
        raise UserError(f"{path}: column {column.name!r} holds {column.dtype}, which MEDS does not; mend the file")
    return column
