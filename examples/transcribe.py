"""What is said in recordings: `python examples/transcribe.py CHECKPOINT FOLDER`.

CHECKPOINT is of `d2v finetune speech-ctc`, or an imported one that spells.
"""

import sys

from d2v.finetune.predict import predict

for name, text, _ in predict(sys.argv[1], sys.argv[2]):
    print(name, text, sep="\t")
