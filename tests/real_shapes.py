"""Small samples of each input in the shape in which people have it: names of files, columns, types and units.

Each maker writes ``NUM_PATIENTS`` invented patients, with labels, and says what ``preprocess.py`` is to be told.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

NUM_PATIENTS = 24
HOURS = 6
START = datetime(2150, 3, 1, 7, 30)

HOURLY_2019 = (
    "HR O2Sat Temp SBP MAP DBP Resp EtCO2 BaseExcess HCO3 FiO2 pH PaCO2 SaO2 AST BUN Alkalinephos Calcium Chloride "
    "Creatinine Bilirubin_direct Glucose Lactate Magnesium Phosphate Potassium Bilirubin_total TroponinI Hct Hgb PTT "
    "WBC Fibrinogen Platelets"
)
DYNAMIC_YAIB = (
    "alb alp alt ast be bicar bili bili_dir bnd bun ca cai ck ckmb cl crea crp dbp fgn fio2 glu hgb hr inr_pt k lact "
    "lymph map mch mchc mcv methb mg na neut o2sat pco2 ph phos plt po2 ptt resp sbp temp tnt urine wbc"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An input, and what must be recognised in it."""

    path: Path
    format: str
    num_samples: int
    flags: tuple[str, ...] = ()


def measure(patients: range) -> Iterator[tuple[int, int, float]]:
    """Yield (patient, hour, value near 80): seeded, the same in every format."""
    chance = np.random.default_rng(0)
    for patient, hour in itertools.product(patients, range(HOURS)):
        yield patient, hour, round(80 + 10 * chance.standard_normal() + 5 * (patient % 2), 1)


def write_meds(folder: Path, subject: str, values: dict[str, pa.DataType]) -> Sample:
    """A MEDS data set with shards by split, static events, births and a label file of all four value columns."""
    ids = range(NUM_PATIENTS)
    names = {"train": ids[:12], "tuning": ids[12:18], "held_out": ids[18:]}
    for split, subjects in names.items():
        rows = [(patient, None, "GENDER//F", None) for patient in subjects]
        rows += [(patient, datetime(2080, 1, 1), "MEDS_BIRTH", None) for patient in subjects]
        rows += [
            (patient, START + timedelta(hours=hour), code, value)
            for patient, hour, value in measure(subjects)
            for code in ("LAB//220045//bpm", "LAB//220210//insp/min")
        ]
        rows.sort(key=lambda row: (row[0], row[1] or datetime.min))
        columns = [list(column) for column in zip(*rows, strict=True)]
        table = {
            subject: pa.array(columns[0], pa.int64()),
            "time": pa.array(columns[1], pa.timestamp("us")),
            "code": pa.array(columns[2], pa.string()),
            "numeric_value": pa.array(columns[3], pa.float32()),
        }
        table |= {name: pa.nulls(len(rows), kind) for name, kind in values.items()}
        path = folder / "data" / split / "0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(table), path)
    (folder / "metadata").mkdir()
    splits = [(patient, split) for split, subjects in names.items() for patient in subjects]
    pl.DataFrame(splits, {subject: pl.Int64, "split": pl.String}, orient="row").write_parquet(
        folder / "metadata" / "subject_splits.parquet"
    )
    codes = {"code": ["LAB//220045//bpm"], "description": ["Heart rate"], "parent_codes": [["LOINC/8867-4"]]}
    pl.DataFrame(codes).write_parquet(folder / "metadata" / "codes.parquet")
    (folder / "metadata" / "dataset.json").write_text(json.dumps({"dataset_name": "demo", "meds_version": "0.4.1"}))
    labels = pl.DataFrame(
        {subject: list(ids), "prediction_time": [START + timedelta(hours=3)] * NUM_PATIENTS,
         "boolean_value": [patient % 2 == 1 for patient in ids], "integer_value": None, "float_value": None,
         "categorical_value": None},
        schema_overrides={"integer_value": pl.Int64, "float_value": pl.Float32, "categorical_value": pl.String},
    )  # fmt: skip
    (folder.parent / "task" / "held_out").mkdir(parents=True)
    labels.write_parquet(folder.parent / "task" / "held_out" / "0.parquet")
    flags = ("--labels", str(folder.parent / "task"))
    return Sample(path=folder, format="meds", num_samples=NUM_PATIENTS, flags=flags)


def meds_0_4(folder: Path) -> Sample:
    return write_meds(folder, "subject_id", {"text_value": pa.large_string()})


def meds_0_3(folder: Path) -> Sample:
    return write_meds(folder, "patient_id", {})


def write_labels(path: Path, header: str) -> tuple[str, ...]:
    rows = [f"{3000 + patient},{patient % 2}" for patient in range(NUM_PATIENTS)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return ("--labels", str(path))


def long_table(folder: Path) -> Sample:
    """STraTS's table as Parquet, with its outcomes beside it."""
    rows = [
        (3000.0 + patient, 60.0 * hour, "HR", value, "chart") for patient, hour, value in measure(range(NUM_PATIENTS))
    ]
    names = ("ts_id", "minute", "variable", "value", "TABLE")
    pl.DataFrame(rows, names, orient="row").write_parquet(folder / "ts.parquet")
    flags = write_labels(folder.parent / "oc.csv", "ts_id,in_hospital_mortality")
    return Sample(path=folder, format="table", num_samples=NUM_PATIENTS, flags=flags)


def wide_table(folder: Path) -> Sample:
    """A row an hour, a column a variable, and a static table beside it."""
    rows = [
        f"{3000 + patient},{START + timedelta(hours=hour)},{value},,Alert"
        for patient, hour, value in measure(range(NUM_PATIENTS))
    ]
    (folder / "hourly.csv").write_text("\n".join(["stay_id,charttime,heart_rate,lactate,avpu", *rows]) + "\n")
    static = [f"{3000 + patient},{50 + patient},F" for patient in range(NUM_PATIENTS)]
    (folder / "static.csv").write_text("\n".join(["stay_id,age,sex", *static]) + "\n")
    flags = (*write_labels(folder.parent / "labels.csv", "stay_id,label"), "--static_tables", "static.csv")
    return Sample(path=folder, format="table", num_samples=NUM_PATIENTS, flags=flags)


def physionet2012(folder: Path) -> Sample:
    """Two sets, each with its outcomes beside it."""
    for number, name in enumerate("ab"):
        (folder / f"set-{name}").mkdir()
        outcomes = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
        for patient in range(number, NUM_PATIENTS, 2):
            rows = ["Time,Parameter,Value", f"00:00,RecordID,{130100 + patient}", "00:00,Age,54", "00:00,Gender,-1"]
            rows += [f"{hour:02}:37,HR,{value}" for _, hour, value in measure(range(patient, patient + 1))]
            (folder / f"set-{name}" / f"{130100 + patient}.txt").write_text("\n".join(rows) + "\n")
            outcomes.append(f"{130100 + patient},-1,-1,5,-1,{patient // 2 % 2}")
        (folder / f"Outcomes-{name}.txt").write_text("\n".join(outcomes) + "\n")
    return Sample(path=folder, format="physionet2012", num_samples=NUM_PATIENTS)


def physionet2019(folder: Path) -> Sample:
    """Both sets, a row an hour, with hourly labels."""
    static = "|".join(["61.2", "1", "NaN", "NaN", "-3.5"])
    for patient in range(NUM_PATIENTS):
        rows = ["|".join([*HOURLY_2019.split(), "Age|Gender|Unit1|Unit2|HospAdmTime|ICULOS|SepsisLabel"])]
        for _, hour, value in measure(range(patient, patient + 1)):
            missing = ["NaN"] * (len(HOURLY_2019.split()) - 1)
            label = int(patient % 2 == 1 and hour > 3)
            rows.append("|".join([str(value), *missing, static, str(hour + 1), str(label)]))
        path = folder / f"training_set{'AB'[patient % 2]}" / f"p{patient:06}.psv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(rows) + "\n")
    return Sample(path=folder, format="physionet2019", num_samples=NUM_PATIENTS * HOURS)


def yaib(folder: Path) -> Sample:
    """The sepsis task: a grid of hours, mostly null, and a label an hour."""
    ids = [100 + patient for patient in range(NUM_PATIENTS) for _ in range(HOURS)]
    time = pl.Series("time", [timedelta(hours=hour) for hour in range(HOURS)] * NUM_PATIENTS, pl.Duration("ms"))
    grid = pl.DataFrame({"stay_id": pl.Series(ids, dtype=pl.Int32)}).with_columns(time)
    hr = [value if hour else None for _, hour, value in measure(range(NUM_PATIENTS))]
    null = pl.lit(None, pl.Float64)
    grid.with_columns(null.alias(name) for name in DYNAMIC_YAIB.split()).with_columns(hr=pl.Series(hr)).write_parquet(
        folder / "dyn.parquet"
    )
    static = {"stay_id": pl.Series(range(100, 100 + NUM_PATIENTS), dtype=pl.Int32), "age": [60.0] * NUM_PATIENTS}
    static |= {
        "sex": ["Female", "Male"] * (NUM_PATIENTS // 2),
        "height": [None] * NUM_PATIENTS,
        "weight": [70.0] * NUM_PATIENTS,
    }
    pl.DataFrame(static).with_columns(pl.col("height").cast(pl.Float64)).write_parquet(folder / "sta.parquet")
    grid.with_columns(label=pl.Series([patient % 2 == 1 for patient in ids])).write_parquet(folder / "outc.parquet")
    (folder / "attrition.csv").write_text("incl_n_total,incl_n,excl_n,excl_n_total\n24,24,0,0\n")
    return Sample(path=folder, format="yaib", num_samples=NUM_PATIENTS * HOURS)


def patient_files(folder: Path) -> Sample:
    """A file a patient with rows carried forward, and outcomes beside the folders."""
    for patient in range(NUM_PATIENTS):
        rows = [
            ("HR", value, 60.0 * hour, hour > 4, 60, 0.5) for _, hour, value in measure(range(patient, patient + 1))
        ]
        split = ("train", "train", "valid", "test")[patient // 2 % 4]
        (folder / split).mkdir(exist_ok=True)
        names = ("variable", "value", "time", "is_carry", "age", "v0")
        pl.DataFrame(rows, names, orient="row").write_parquet(folder / split / f"{3000 + patient}.0.parquet")
    write_labels(folder / "oc.csv", "ts_id,in_hospital_mortality")
    return Sample(path=folder, format="patient_files", num_samples=NUM_PATIENTS)


def mimic_iv(folder: Path) -> Sample:
    """chartevents as it is published, and minutes from admission to intensive care."""
    header = "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning"
    rows = [
        f'1{patient},2{patient},{3000 + patient},,{START + timedelta(hours=hour)},,220045,"{value}",{value},bpm,0'
        for patient, hour, value in measure(range(NUM_PATIENTS))
    ]
    rows += [
        f"1{patient},2{patient},{3000 + patient},,{START},,220739,Spontaneously,4,,0" for patient in range(NUM_PATIENTS)
    ]
    (folder / "chartevents.csv.gz").write_bytes(gzip.compress(("\n".join([header, *rows]) + "\n").encode()))
    stays = ["subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los"]
    stays += [
        f"1{patient},2{patient},{3000 + patient},MICU,MICU,{START - timedelta(minutes=30)},,1.5"
        for patient in range(NUM_PATIENTS)
    ]
    origins = folder.parent / "icustays.csv.gz"
    origins.write_bytes(gzip.compress(("\n".join(stays) + "\n").encode()))
    flags = write_labels(folder.parent / "labels.csv", "stay_id,label")
    flags = (*flags, "--origin_table", f"{origins}:stay_id:intime")
    return Sample(path=folder / "chartevents.csv.gz", format="table", num_samples=NUM_PATIENTS, flags=flags)


MAKERS: tuple[Callable[[Path], Sample], ...] = (
    meds_0_3, meds_0_4, long_table, wide_table, physionet2012, physionet2019, yaib, patient_files, mimic_iv,
)  # fmt: skip
