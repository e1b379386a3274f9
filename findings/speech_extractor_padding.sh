#!/bin/sh
# transformers 5.23.0: what Wav2Vec2FeatureExtractor, which Data2VecAudio uses too, makes of one recording beside a longer one.
#
# By default it normalises (do_normalize) and returns no attention mask (return_attention_mask=False). Then the mean and the
# deviation of a recording are taken over its padding as well. Seen here, for noise of 8,000 samples with a mean of 0.05 and a
# deviation of 0.1:
#   alone: deviation 1.000; in a batch with one of 32,000 samples, or padded to 32,000: deviation 1.836, and the padding is
#   -0.229 and not 0;
#   the scale grows with the square root of the padding: 2.6 beside one of 64,000;
#   with return_attention_mask=True: deviation 1.000 and padding of 0, whatever it is padded to.
# So a model sees a recording at another level for each length of its neighbours, with no warning, unless the folder of the model
# has a preprocessor_config.json that says return_attention_mask.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" transformers==5.23.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - <<'PY' 2>/dev/null
import sys

import numpy as np
import transformers
from transformers import Wav2Vec2FeatureExtractor

RATE, LENGTH = 16_000, 8_000
print(f"transformers {transformers.__version__}, numpy {np.__version__}")
rng = np.random.default_rng(0)
recording = (0.1 * rng.standard_normal(LENGTH) + 0.05).astype(np.float32)


def see(extractor: Wav2Vec2FeatureExtractor, *others: int, **padding: object) -> tuple[float, float]:
    """Deviation of the recording in a batch with noise of other lengths, and the value of its padding."""
    batch = [recording, *(0.1 * rng.standard_normal(n).astype(np.float32) for n in others)]
    values = np.asarray(extractor(batch, sampling_rate=RATE, **{"padding": True, **padding})["input_values"][0])
    return round(float(values[:LENGTH].std()), 3), round(float(values[-1]), 3) if len(values) > LENGTH else 0.0


plain, masked = Wav2Vec2FeatureExtractor(), Wav2Vec2FeatureExtractor(return_attention_mask=True)
whole = {"padding": "max_length", "max_length": 32_000}
found = {
    "alone": see(plain), "beside 32,000": see(plain, 32_000), "padded to 32,000": see(plain, **whole),
    "beside 64,000": see(plain, 64_000), "mask, beside 32,000": see(masked, 32_000), "mask, padded": see(masked, **whole),
}
for name, (deviation, padding) in found.items():
    print(f"{name}: deviation {deviation}, padding {padding}")
right = (1.0, 0.0)
same = [found[n] for n in ("alone", "mask, beside 32,000", "mask, padded")] == [right] * 3
same = same and found["beside 32,000"] == found["padded to 32,000"] == (1.836, -0.229) and found["beside 64,000"][0] > 2.5
print("as stated" if same else "changed")
sys.exit(not same)
PY
