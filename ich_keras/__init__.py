"""Detect intracranial haemorrhage and its five subtypes on head CT, with Keras 3, in 2D and 3D.

Not a medical device; not for clinical use.

Map of rooms:
    ct       from DICOM files to Hounsfield units: read_hu, index_folder, windows
    phantom  synthetic head CT: write_phantoms
    data     from the index to batches: labels, split, cache, preprocessing, augmentation
    models   networks: presets, one ResNet builder, the classifier, weights
    metrics  scores of predictions, with intervals, calibration and thresholds
At this level: workflow, planning, training, evaluation, prediction, report, demo; `ich` (cli) calls
them.
Modules are nouns so that the verbs (`ich_keras.train`, `ich_keras.evaluate`) can be functions.

Importing this package is light: neither keras nor torch is imported before a name needs it. Keras
runs on torch unless KERAS_BACKEND says otherwise (or Keras is already loaded with another backend).
"""

import importlib
import os
import sys
from typing import Any

__version__ = "0.2.0"

if "keras" not in sys.modules:
    os.environ.setdefault("KERAS_BACKEND", "torch")

# Public name -> module that holds it; imported on first use.
_PUBLIC = {
    "LABELS": "ich_keras.labels",
    "IchError": "ich_keras.errors",
    "read_hu": "ich_keras.ct.dicom",
    "index_folder": "ich_keras.ct.series",
    "SeriesIndex": "ich_keras.ct.series",
    "Window": "ich_keras.ct.window",
    "write_phantoms": "ich_keras.phantom.dicom",
    "make_phantom": "ich_keras.phantom.plan",
    "PhantomSpec": "ich_keras.phantom.plan",
    "read_rsna_labels": "ich_keras.data.rsna_labels",
    "join_labels": "ich_keras.data.labels",
    "CTCache": "ich_keras.data.cache.cache",
    "build_cache": "ich_keras.data.cache.cache",
    "slice_input": "ich_keras.data.inputs",
    "volume_input": "ich_keras.data.inputs",
    "View": "ich_keras.data.views",
    "Augmentation": "ich_keras.data.augment",
    "slice_batches": "ich_keras.data.batches",
    "slab_batches": "ich_keras.data.batches",
    "series_batches": "ich_keras.data.batches",
    "classifier": "ich_keras.models.classifier",
    "build_classifier": "ich_keras.models.classifier",
    "build_backbone": "ich_keras.models.classifier",
    "compile_classifier": "ich_keras.models.classifier",
    "freeze": "ich_keras.models.classifier",
    "choose_step": "ich_keras.models.steps",
    "Adam": "ich_keras.models.optimizer",
    "BinaryCrossEntropy": "ich_keras.models.loss",
    "get_windows": "ich_keras.learned_windows",
    "feature_model": "ich_keras.models.resnet",
    "ModelSpec": "ich_keras.models.spec",
    "Recipe": "ich_keras.recipe",
    "read_recipe": "ich_keras.model_file",
    "RunFolder": "ich_keras.run_folder",
    "export_run": "ich_keras.export.runs",
    "load_run": "ich_keras.inference",
    "RunConfig": "ich_keras.config",
    "DataConfig": "ich_keras.config",
    "FitConfig": "ich_keras.config",
    "train": "ich_keras.shortcuts",
    "split": "ich_keras.shortcuts",
    "audit": "ich_keras.shortcuts",
    "presets": "ich_keras.shortcuts",
    "submission": "ich_keras.shortcuts",
    "resume": "ich_keras.training",
    "train_more": "ich_keras.extension",
    "tensorboard_callback": "ich_keras.tensorboard_log",
    "evaluate": "ich_keras.evaluation",
    "predict_folder": "ich_keras.prediction",
    "view": "ich_keras.viewing",
    "predict_arrays": "ich_keras.arrays",
    "cache_from_arrays": "ich_keras.arrays",
    "explain": "ich_keras.explanation",
    "explain_series": "ich_keras.explanation",
    "HeatMaps": "ich_keras.explanation",
    "MapOptions": "ich_keras.relevance",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
