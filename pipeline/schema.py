"""Words, columns, dtypes and errors that every other file shares.

An *event* is one (variable, value) recorded for a patient at a minute.  A *set* is all events of one
patient in one minute.  A *patient* is one sequence of sets.  ``num_events`` and ``num_sets`` are a
patient's two lengths; a bare "length" appears nowhere.  A *task* is a table of labels, and a *sample* one row of it: a
patient's events up to a prediction time.
"""

from __future__ import annotations

from typing import Final, Literal

FORMAT_VERSION: Final = 2  # of the layout in docs/format.md; a reader refuses any other

PADDING_CODE: Final = 0
UNKNOWN_CODE: Final = 1
FIRST_CODE: Final = 2  # of variables, which are numbered in the order of their names

UNLABELLED: Final = -1

FLOAT32_MAX: Final = 2.0**128 - 2.0**104  # the greatest finite float32, in which batches hold minutes and values

PRIVATE_UMASK: Final = 0o077  # of both command lines: only their owner can read files of patients

SPLITS: Final = ("train", "valid", "test")

# Canonical columns of an event table, as every source gives them.
PATIENT_ID: Final = "patient_id"  # string
MINUTE: Final = "minute"  # float64, from the patient's time origin, may be negative
VARIABLE: Final = "variable"  # string
VALUE: Final = "value"  # float32, null = the event has no number
SET_INDEX: Final = "set_index"  # int64, optional

# Names inside a data directory.
MANIFEST_FILE: Final = "manifest.json"
INDEX_FILE: Final = "index.parquet"
VOCABULARY_FILE: Final = "vocabulary.parquet"
EMBEDDINGS_FILE: Final = "embeddings.npy"
REJECTS_FILE: Final = "rejects.parquet"
SUMMARY_FILE: Final = "summary.json"
REPORT_FILE: Final = "report.html"
TASKS_FOLDER: Final = "tasks"

DEFAULT_TASK: Final = "default"  # the task that preprocess.py makes of the labels that it is given

# Columns of a table of labels beside the patient, as every reader of labels gives them.
PREDICTION_TIME: Final = "prediction_time"  # Datetime("us"), UTC; null = the whole patient
PREDICTION_MINUTE: Final = "prediction_minute"  # float64, from the patient's time origin; null = the whole patient
LABEL: Final = "label"  # null = unlabelled


Kind = Literal["binary", "multiclass", "regression"]
"""What the labels of a task are: of two classes, of several, or numbers."""

Times = Literal["date", "minute"]
"""What the prediction times of a task are."""

TIME_COLUMNS: Final[dict[Times, str]] = {"date": PREDICTION_TIME, "minute": PREDICTION_MINUTE}
"""The columns that have them, as the labels give them."""


class UserError(ValueError):
    """An error that the user can repair.

    The message is one line that names the file, row or flag and says what to do.  Command lines print it
    on standard error and exit with code 2; everything else that is raised is a defect of this program.
    """
