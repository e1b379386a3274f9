"""The model: student, teacher, targets, loss."""
