"""Ragged columns: rows of different lengths, picked and padded."""

import numpy as np
import torch

from mlpipes.data.ragged import Ragged
from mlpipes.workloads.tensors import on_device


def test_ragged_columns_pad_and_pick_rows() -> None:
    column = Ragged.of([np.array([1, 2, 3]), np.array([]), np.array([4])], np.int32)
    assert column[np.array([2, 0])].lengths.tolist() == [1, 3]
    tensor = on_device({"tokens": column}, torch.device("cpu"))["tokens"]
    ids, real = tensor.padded(torch.tensor([2, 0, 1]))
    assert ids.tolist() == [[4, 0, 0], [1, 2, 3], [0, 0, 0]]
    assert real.sum(1).tolist() == [1, 3, 0]
