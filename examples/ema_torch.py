"""torch's averaged model with one pass a step instead of several: `python examples/ema_torch.py`."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from d2v_kernels import update_ema_


def ema_multi_avg_fn(decay=0.999):
    """For `get_ema_multi_avg_fn(decay)`: the `multi_avg_fn` of an `AveragedModel`."""
    of_integers = get_ema_multi_avg_fn(decay)

    def update(averages, sources, num_averaged):
        if averages[0].is_floating_point():
            update_ema_(averages, sources, decay)
        else:  # buffers that count batches
            of_integers(averages, sources, num_averaged)

    return update


if __name__ == "__main__":
    student = torch.nn.Linear(4, 4)
    teacher = AveragedModel(student, multi_avg_fn=ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        torch.nn.init.normal_(student.weight)
        teacher.update_parameters(student)
    print(teacher.module.weight)
