"""The README's Python example, word for word, on whatever backend KERAS_BACKEND names."""

import re
from pathlib import Path

import keras
import numpy as np

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    section = README.read_text(encoding="utf-8").split("## The Python way", 1)[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


def test_stock_compile_and_fit_on_a_cache(phantom_cache_folder, tmp_path, monkeypatch):
    program = example()
    assert len(program.strip().splitlines()) <= 12
    # Only sizes and places are exchanged: the example's words stay.
    for original, ours in (('"CACHE"', repr(str(phantom_cache_folder))), ("epochs=6", "epochs=2")):
        assert original in program
        program = program.replace(original, ours)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(program, str(README), "exec"), names)
    losses = names["model"].history.history["loss"]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    saved = keras.saving.load_model(tmp_path / "ich.keras")
    image = np.zeros((1, *saved.input_shape[1:]), "float32")
    probabilities = np.asarray(saved.predict_on_batch(image))
    assert probabilities.shape == (1, 6)
    assert ((probabilities > 0) & (probabilities < 1)).all()
