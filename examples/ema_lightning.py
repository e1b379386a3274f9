"""A Lightning callback that averages all parameters in one pass: `Trainer(callbacks=[EmaCallback(0.9999)])`."""

from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from d2v_kernels import update_ema_


class EmaCallback(WeightAveraging):
    """For Lightning's `EMAWeightAveraging`: the averages are validated, saved, and the model's at the end."""

    def __init__(self, decay=0.999, use_buffers=True, every_n_steps=1, start=0):
        of_integers = get_ema_multi_avg_fn(decay)

        def update(averages, sources, num_averaged):
            if averages[0].is_floating_point():
                update_ema_(averages, sources, decay)
            else:  # buffers that count batches
                of_integers(averages, sources, num_averaged)

        super().__init__(use_buffers=use_buffers, multi_avg_fn=update)
        self.every_n_steps, self.start = every_n_steps, start

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= self.start and step_idx % self.every_n_steps == 0
