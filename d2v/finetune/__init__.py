"""From a pre-trained model to a result: heads, labels, augmentation, decoding, metrics, and the fine-tuning run."""
