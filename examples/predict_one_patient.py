"""Predict for one new patient from a data frame: ``python examples/predict_one_patient.py MODEL_FOLDER``.

``train.py --export MODEL_FOLDER`` wrote the folder; neither the data set nor the checkpoint is needed.
"""

import sys

import polars as pl

import model
from training.predict import predict_patients

seqsetvae = model.load_model(sys.argv[1])

# Raw values in the units of the training data, minutes from any origin that the training data has too.
events = pl.DataFrame(
    [
        ("new patient", 0.0, "variable_00", 71.5),
        ("new patient", 0.0, "variable_39", None),  # an event without a number
        ("new patient", 12.0, "variable_07", 3.25),
        ("new patient", 95.5, "variable_00", 64.0),
    ],
    schema=["patient_id", "minute", "variable", "value"],
    orient="row",
)

vocabulary = seqsetvae.vocabulary
usual = dict(zip(vocabulary["variable"], zip(vocabulary["mean"], vocabulary["std"], strict=True), strict=True))
for variable, value in events.select("variable", "value").drop_nulls().iter_rows():
    mean, std = usual[variable]  # KeyError: the training data has no such variable
    print(f"{variable} = {value}: {(value - mean) / std:+.1f} standard deviations from the mean")

(answer,) = predict_patients(seqsetvae, events, log=print).to_pylist()
print(f"{answer['patient_id']}: probability {answer['probability']:.3f}")
