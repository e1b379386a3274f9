"""Classes of texts: `python examples/classify_text.py CHECKPOINT FILE`, CHECKPOINT of `finetune text-classify`.

FILE holds a text per block between blank lines.
"""

import sys

from d2v.finetune.predict import predict

for name, label, probability in predict(sys.argv[1], sys.argv[2]):
    print(name, label, f"{probability:.3f}", sep="\t")
