"""The Auto classes of transformers make inputs of an exported folder as d2v does; other ways are told on import."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from interop.test_huggingface import tiny_model
from PIL import Image

from d2v.config.finetune import HeadSettings
from d2v.data.decoding.sound import SAMPLE_RATE, normalise_waveform
from d2v.data.vision import ImageSettings, centre_image, normalise_images
from d2v.finetune.spelling import SPECIALS, Letters
from d2v.interop import huggingface
from d2v.model.finetuned import FineTuned
from d2v.model.task_heads import make_head

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:format huggingface")
LABELS = [*SPECIALS, "|", "e", "t", "a"]


def recordings() -> list[np.ndarray]:
    """Two of different lengths and levels."""
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(n) * 0.7 + 0.2).astype(np.float32) for n in (9000, 21_000)]


def test_speech_in_a_batch_is_normalised_alone(tmp_path: Path) -> None:
    extract = transformers.AutoFeatureExtractor.from_pretrained(
        huggingface.save(tiny_model("hf_audio"), tmp_path / "m")
    )
    found = extract(recordings(), sampling_rate=SAMPLE_RATE, padding=True, return_tensors="np")
    for values, mask, recording in zip(found["input_values"], found["attention_mask"], recordings(), strict=True):
        assert mask.sum() == len(recording) and not values[len(recording) :].any()
        np.testing.assert_allclose(values[: len(recording)], normalise_waveform(recording), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(24, 24), (60, 36), (36, 60)])
def test_images(tmp_path: Path, size: tuple[int, int]) -> None:
    model = tiny_model("hf_vision")
    folder = huggingface.save(model, tmp_path / "m")
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    found = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    settings = ImageSettings.of(model.config)
    wanted = normalise_images(torch.from_numpy(centre_image(image, settings))[None], settings, "imagenet")
    # One grey level is 0.018; of other shapes the edges of the crop are resized from other pixels.
    assert float((found - wanted).abs().max()) < (1e-5 if size == (24, 24) else 0.2)
    assert float((found - wanted).abs().mean()) < 0.02


def test_images_that_no_class_makes(tmp_path: Path) -> None:
    encoder = tiny_model("hf_vision")
    encoder.config = encoder.config.change(data={"standardise": "sample"})
    assert not (huggingface.save(encoder, tmp_path / "m") / "preprocessor_config.json").exists()


def test_text_is_cut_at_the_longest_position(tmp_path: Path) -> None:
    folder = huggingface.save(tiny_model("hf_text"), tmp_path / "m")
    assert transformers.AutoTokenizer.from_pretrained(folder).model_max_length == 40


def test_letters_are_read_by_the_pipeline(tmp_path: Path) -> None:
    encoder = tiny_model("hf_audio")
    head = make_head(HeadSettings("tokens", len(LABELS), task="ctc"), encoder.config.encoder.width)
    with torch.no_grad():
        head.out.weight.normal_(0.0, 3.0)
        head.out.bias[1 : len(SPECIALS)] = -1e3  # as of a model that was trained
    folder = huggingface.save(FineTuned(encoder, head, LABELS).eval(), tmp_path / "m")
    labels = [0, 6, 6, 0, 6, 5, 4, 4, 7, 0, 4]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(labels) == "tte a" == Letters(LABELS).decode([6, 6, 5, 4, 7, 4])
    read = transformers.pipeline("automatic-speech-recognition", model=str(folder))
    (recording, _), again = recordings(), huggingface.load(folder).eval()
    with torch.no_grad():
        best = again(torch.from_numpy(normalise_waveform(recording))[None]).argmax(-1)[0]
    path = torch.unique_consecutive(best).tolist()
    words = Letters(LABELS).decode([i for i in path if i])
    assert words and read(recording)["text"].split() == words.split()


@pytest.mark.parametrize(
    ("case", "key", "value"), [("hf_audio", "do_normalize", False), ("hf_vision", "image_mean", [0.5, 0.5, 0.5])]
)
def test_other_inputs_are_told_on_import(tmp_path: Path, case: str, key: str, value: object) -> None:
    folder = huggingface.save(tiny_model(case), tmp_path / "m")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.warns(UserWarning, match=f"{key}: expected .*, got .*d2v prepares inputs its own way"):
        huggingface.load(folder)


def test_a_list_says_nothing_of_inputs(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = huggingface.save(tiny_model("hf_vision"), tmp_path / "m")
    (folder / "preprocessor_config.json").write_text('["image_mean"]')
    huggingface.load(folder)
    assert not [w for w in recwarn if "prepares" in str(w.message)]
