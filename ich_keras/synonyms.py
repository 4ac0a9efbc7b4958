"""What other tools call our options and settings: an unknown name leads to the right one."""

import difflib
from collections.abc import Iterable

# Ours -> what others call it, all in small letters with hyphens. Letters are what stands behind a
# single hyphen elsewhere.
_OTHERS: dict[str, str] = {
    "accumulate": "accum accumulation accumulation-steps accumulate-grad-batches grad-accum"
    " gradient-accumulation gradient-accumulation-steps iter-size update-freq",
    "augment": "aug augmentation augmentations auto-augment transform transforms no-augment",
    "backend": "framework engine",
    "balance": "balanced oversample oversampling sampler balanced-sampling weighted-sampler",
    "batch-norm": "sync-bn syncbn sync-batchnorm bn",
    "batch-size": "b bs batch batchsize batch-per-gpu train-batch-size per-device-train-batch-size",
    "cache": "data dataset data-dir data-path data-root root cache-dir",
    "compiled": "compile torch-compile jit no-compile",
    "config": "c cfg config-file yaml hparams params settings",
    "device": "d accelerator cuda gpu gpu-id gpu-ids use-gpu cpu no-cuda devices",
    "dicom": "data dataset data-dir data-path data-root root i input input-dir images image-dir"
    " images-dir dicom-dir folder train-dir source src",
    "crop": "crop-head head-crop brain-crop crop-foreground center-crop",
    "cutmix": "cutmix-alpha",
    "depth-mm": "z-spacing target-spacing resample-spacing",
    "drop-slices": "slice-dropout drop-slice",
    "ema": "ema-decay model-ema use-ema ema-momentum exponential-moving-average",
    "epochs": "e ep epoch num-epochs n-epochs nb-epochs nepochs max-epochs num-train-epochs",
    "focal-alpha": "alpha",
    "focal-gamma": "gamma",
    "freeze": "frozen freeze-backbone freeze-encoder freeze-layers frozen-stages",
    "gpus": "gpu num-gpus n-gpus ngpu ngpus gpu-ids num-gpu devices nproc-per-node gpus-per-node"
    " world-size",
    "hu-noise": "noise gaussian-noise noise-std",
    "intensity": "window windowing normalize normalization normalise",
    "label-weight": "class-weight class-weights label-weights loss-weights weights-per-class",
    "labels": "l label label-file csv csv-file annotations annotation targets ground-truth"
    " train-csv",
    "learning-rate": "lr learningrate learn-rate lr0 lr-init init-lr initial-lr base-lr max-lr eta"
    " rate",
    "limit-series": "limit max-samples max-train-samples num-samples subset limit-train-batches"
    " max-series",
    "loader-workers": "num-workers n-workers nworkers dataloader-num-workers data-workers j jobs",
    "loss": "criterion loss-fn loss-function objective",
    "mixup": "mixup-alpha mix-up",
    "more-epochs": "extra-epochs additional-epochs extend",
    "norm": "norm-layer normalization-layer",
    "out": "o output output-dir out-dir outdir save-dir save-path work-dir run-dir run-name"
    " default-root-dir project exp-name experiment results",
    "patience": "early-stop early-stopping early-stopping-patience stop-patience",
    "plan": "dry-run dryrun n",
    "positive-weight": "pos-weight pos-weights positive-weights class-weight class-weights",
    "precision": "amp fp16 fp32 bf16 half mixed-precision dtype use-amp",
    "predictions": "prediction preds",
    "preset": "m model models arch architecture net network backbone encoder model-name model-type",
    "recompute": "gradient-checkpointing grad-checkpointing checkpointing activation-checkpointing",
    "resume": "continue restart resume-from resume-from-checkpoint auto-resume last ckpt-path",
    "run": "model model-path model-dir checkpoint ckpt weights run-dir",
    "schedule": "scheduler lr-scheduler lr-schedule lr-scheduler-type sched lr-policy",
    "seed": "s random-seed random-state manual-seed rng",
    "size": "img-size image-size imgsz input-size resize resolution crop-size img",
    "slices": "num-slices n-slices depth num-frames",
    "split": "cv val-split val-fraction valid-fraction validation-split test-size"
    " test-split train-split",
    "swa": "swa-epochs use-swa swa-start stochastic-weight-averaging",
    "tensorboard": "tb tensorboard-dir tb-dir log-dir logdir logger log report-to",
    "skip-empty": "filter-empty ignore-empty drop-empty",
    "view": "mode dim dims dimension",
    "warmup-steps": "warmup warm-up warmup-epochs warmup-iters num-warmup-steps warmup-ratio",
    "weight-decay": "wd l2 decay l2-reg weightdecay",
    "weights": "pretrained pretrain pretrained-weights checkpoint ckpt init-weights init-checkpoint"
    " load-weights finetune-from",
    "windows": "learnable-windows learn-windows trainable-windows window-layer wso",
    "workers": "num-workers n-workers nworkers j jobs n-jobs threads num-threads nproc processes",
}
SYNONYMS: dict[str, tuple[str, ...]] = {
    other: tuple(ours for ours, others in _OTHERS.items() if other in others.split())
    for other in sorted({word for words in _OTHERS.values() for word in words.split()})
}
# Below this, a likeness misleads: --lr is as like --loss as many a typing error.
_CUTOFF = 0.75


def meant_by(name: str, known: Iterable[str]) -> list[str]:
    """Return which of the known names an unknown one may mean, the likeliest first.

    Args:
        name: as it was given, with hyphens or underscores.
        known: the names that exist here.

    >>> meant_by("lr", ["loss", "learning_rate"]), meant_by("colour", ["loss"])
    (['learning_rate'], [])
    """
    names = {_plain(one): one for one in known}
    word = _plain(name)
    if word in names:  # written in another way
        return [names[word]]
    found = [names[ours] for ours in SYNONYMS.get(word, ()) if ours in names]
    if not found:
        found = [names[one] for one in difflib.get_close_matches(word, names, 3, _CUTOFF)]
    if not found and len(word) > 2:  # cut short, or with a word added
        found = [names[one] for one in names if one.startswith(f"{word}-")]
        found += [names[one] for one in names if word.startswith(f"{one}-")]
    return found


def question(found: Iterable[str]) -> str:
    """Return "Did you mean ...?" for names that may be meant; "" for none.

    >>> question(["size", "slices"])
    "Did you mean 'size' or 'slices'?"
    """
    names = [repr(name) for name in found]
    return f"Did you mean {' or '.join(names)}?" if names else ""


def _plain(name: str) -> str:
    return name.strip("-_").replace("_", "-").lower()
