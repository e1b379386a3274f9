"""timm's moving average in one pass, and with float32 averages of bfloat16 models: `python examples/ema_timm.py`."""

import torch
from timm.utils.model_ema import ModelEmaV3

from d2v_kernels import EmaPlan


class ModelEma(ModelEmaV3):
    """For `ModelEmaV3`, with its arguments. Averages of a bfloat16 model are the upper halves of float32 numbers."""

    def __init__(self, model, *args, **options):
        super().__init__(model, *args, **options)
        buffers = "copy" if self.exclude_buffers else "average"
        split = all(p.dtype == torch.bfloat16 for p in self.module.parameters())
        self.plan, self.models = EmaPlan.from_modules(self.module, model, buffers=buffers, split=split), (model,)

    def update(self, model, step=None):
        if model is not self.models[0]:
            raise ValueError(f"ModelEma: model: expected the one it was made with, got another {type(model).__name__}")
        self.plan.step(self.get_decay(step))


if __name__ == "__main__":
    student = torch.nn.Linear(4, 4)
    teacher = ModelEma(student, decay=0.9)
    torch.nn.init.normal_(student.weight)
    teacher.update(student)
    print(teacher.module.weight)
